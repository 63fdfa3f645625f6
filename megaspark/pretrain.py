"""What `deepspeed` launches: one process of a training run.

Works from any folder, installed or not: run by path, Python puts this file's folder first on sys.path, where our module names
would stand beside everybody's; it is replaced by the checkout's root.
"""

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _here:
    sys.path[0] = str(_here.parent)

from megaspark.cli import main  # noqa: E402 (sys.path had to be mended first)

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
