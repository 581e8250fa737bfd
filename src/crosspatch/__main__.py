# SPDX-License-Identifier: Apache-2.0
"""`python -m crosspatch` is the command line."""

from crosspatch.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
