"""``python -m trio_pool`` is the command line ``trio-pool``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
