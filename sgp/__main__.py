"""`python -m sgp`: the same as the console script `sgp`."""

import sys

from sgp.cli import main

if __name__ == "__main__":
    sys.exit(main())
