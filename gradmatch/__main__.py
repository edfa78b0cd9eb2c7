"""`python -m gradmatch` is the `gradmatch` command."""

import sys

from gradmatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
