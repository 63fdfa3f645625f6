"""`python -m megaspark` is the `megaspark` command."""

import sys

from megaspark.cli import main

sys.exit(main())
