"""Keeps glibc from giving large buffers back to the kernel between training steps.

By default every activation of some MiB is mapped afresh and faulted in page by page, each step
anew. With higher thresholds the buffers stay in the heap, and a training step on a CPU takes less
time (`benchmarks/training_step.py` measures how much).
"""

from __future__ import annotations

import ctypes
import sys

LARGEST_IN_HEAP = 32 << 20
"""Bytes from which on a block is mapped by itself: the highest that glibc accepts, on 64 bits."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER_TRIM = (1 << 31) - 1
_TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process; False where there is no glibc to ask."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = mallopt(_M_MMAP_THRESHOLD, LARGEST_IN_HEAP) == 1
    accepted &= mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) == 1
    accepted &= mallopt(_M_TOP_PAD, _TOP_PAD) == 1
    return bool(accepted)
