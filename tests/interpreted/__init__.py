"""Tests that need Triton's interpreter, which is chosen when triton is first imported: see tests/test_interpreted.py."""
