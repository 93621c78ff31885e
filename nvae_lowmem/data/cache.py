"""The cache folder, and files in it that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nvae_lowmem.files import partial_file

_APPLICATION = "nvae-lowmem"


def cache_folder(given: str) -> Path:
    """The given folder, else this program's own below the user's cache folder of the platform."""
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / _APPLICATION


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write a compressed .npz under another name first: nobody ever sees half of it. Raises OSError."""
    with partial_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub mistakes them for a flag


@contextlib.contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine is inside for the same path (POSIX; elsewhere nobody waits).

    The system drops the lock of a process that dies, so none is ever left over. Raises OSError.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    # A link in the lock's place is not followed, and nothing is ever emptied: the file it leads to may be anybody's.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(path.with_name(path.name + ".lock"), flags, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
