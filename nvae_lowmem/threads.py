"""How OpenMP's threads wait for each other on the CPU."""

from __future__ import annotations

import os


def wait_politely() -> None:
    """Have idle OpenMP threads spin briefly, then sleep; call it before torch is imported. The user's setting wins.

    GNU OpenMP's default spins for ever where there are as many threads as cores. On a busy machine a thread then spins
    away the core that the thread it waits for needs; a short spin is as fast on an idle one (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")
