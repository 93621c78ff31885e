"""The CPU as a device to train on: how OpenMP's threads wait, and how the C library treats freed memory."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


def wait_politely() -> None:
    """Have idle OpenMP threads spin briefly, then sleep; call it before torch is imported. The user's setting wins.

    GNU OpenMP's default spins for ever where there are as many threads as cores. On a busy machine a thread then spins
    away the core that the thread it waits for needs; a short spin is as fast on an idle one (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def keep_freed_memory() -> bool:
    """Have glibc reuse the memory of freed tensors instead of returning it; whether that worked.

    By default every tensor above 128 KiB (later up to 32 MiB) is mapped and unmapped, and each first touch of its pages
    is a page fault: several times the cost of the arithmetic where faults are slow, as in virtual machines. A training
    step asks for the same sizes again and again, so keeping them costs no more than its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library (musl)
    wanted = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1, _M_TOP_PAD: 64 << 20}
    return all(mallopt(option, value) for option, value in wanted.items())
