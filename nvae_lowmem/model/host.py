"""Marks the memory that lies in the host's RAM, for those who watch where bytes are.

On a machine without a GPU the CPU stands in for the card while a step is traced; what is made inside `host_memory()` is
host memory all the same.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_thread = threading.local()


def in_host_memory() -> bool:
    """Whether this thread is making tensors that live in host memory whatever the device is."""
    return getattr(_thread, "depth", 0) > 0


@contextlib.contextmanager
def host_memory() -> Iterator[None]:
    """Tensors made inside belong to the host, not to the device."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1
