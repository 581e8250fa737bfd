"""`python -m hostile.quick SECONDS PLACES FORMATS serve …`: the command, told a bit more.

Its clients get SECONDS to send their headers, and as many for their body, so that tests of slow
ones do not take eight; its queue has PLACES instead of a number that depends on the machine; and it
reads FORMATS, with commas between them, which `Service` may be told and the command may not.
"""

import sys

from crosspatch.cli.main import main
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.service import Service

if __name__ == "__main__":
    seconds, places, formats, *words = sys.argv[1:]
    limits, service = Limits.__init__.__kwdefaults__, Service.__init__.__kwdefaults__
    assert limits is not None
    assert service is not None
    limits |= {"head_seconds": float(seconds), "body_seconds": float(seconds)}
    service |= {"queue": int(places), "formats": tuple(formats.split(","))}
    sys.exit(main(words))
