"""How OpenMP's threads wait for each other on the CPU."""

from __future__ import annotations

import os


def wait_politely() -> None:
    """Have idle OpenMP threads sleep instead of spin; to be called before torch is imported. The user's setting wins.

    Spinning gains a little on an idle machine and loses many times that on a busy one, where a thread spins away the
    core that the thread it waits for needs.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
