"""The C library's allocator told to keep the memory that it has: a training step asks for the same buffers again and again."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1  # mallopt(3): "disables trimming completely"; the largest int would be 2 GB, which a larger model frees at once
_GROWTH_BYTES = 64 << 20


def keep_pages() -> bool:
    """Keeps freed memory in the process, in place of giving it back to the kernel and faulting it in again at the next step.

    By default glibc maps every block above 32 MiB anew, so each page of a step's large buffers is zeroed by the kernel at its
    first touch. Raising M_MMAP_THRESHOLD does not help: glibc refuses values above 32 MiB. Returns whether the library obeyed
    (False where it is not glibc); the price is memory that is not given back between steps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROWTH_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted)
