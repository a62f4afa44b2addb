"""python -m hvd_compress COMMAND, also hvd-compress COMMAND."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
