"""`python -m megaspark` is the `megaspark` command."""

import sys

from megaspark.cli import main

if __name__ == "__main__":
    sys.exit(main())
