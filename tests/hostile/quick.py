"""`python -m hostile.quick SECONDS PLACES serve …`: the command as it is, but its clients get
SECONDS to send their headers, and as many for their body, so that tests of slow ones do not take
eight; and its queue has PLACES instead of a number that depends on the machine."""

import sys

from crosspatch.cli.main import main
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.service import Service

if __name__ == "__main__":
    seconds, places, *words = sys.argv[1:]
    limits, service = Limits.__init__.__kwdefaults__, Service.__init__.__kwdefaults__
    assert limits is not None
    assert service is not None
    limits |= {"head_seconds": float(seconds), "body_seconds": float(seconds)}
    service |= {"queue": int(places)}
    sys.exit(main(words))
