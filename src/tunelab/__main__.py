"""`python -m tunelab` is `tunelab`."""

import sys

from tunelab.cli import main

if __name__ == "__main__":
    sys.exit(main())
