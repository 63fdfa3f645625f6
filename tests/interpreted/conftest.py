"""Keeps these files out of a process whose triton would compile for a GPU; tests/test_interpreted.py gives each its own."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
