"""The allocator: freed memory stays with the process, so that the next step need not fault it in again."""

import pytest

TEXT = """
import resource, sys
import torch
from megaspark.allocators import keep_pages

torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_pages():
    print("no glibc")
    sys.exit()
faults = []
for _ in range(8):  # glibc finds a freed aligned block too small for its like until it has joined its neighbours
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(32 << 20)  # 128 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def test_keep_pages(run_python):
    """A setting that the C library refuses (it does so silently) leaves a page fault for each page of every large buffer."""
    kept = run_python(TEXT, "keep").checked().stdout.strip()
    if kept == "no glibc":
        pytest.skip("the C library is not glibc")
    given_back = int(run_python(TEXT, "default").checked().stdout)
    # 5 x 128 MiB are 163,840 pages of 4 KiB, or 320 of 2 MiB where the kernel makes huge ones.
    assert given_back >= 300 and int(kept) < given_back / 10
