"""LMDBs as the published NVAE writes them: keys b"0", b"1" and so on.

A value is one square image as raw RGB bytes, or a whole image file: the published script for CelebA puts the JPEG files
in as they are.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import lmdb
from PIL import Image

from nvae_lowmem.data.decode import MAX_FILE_BYTES, UnreadableImage, decode
from nvae_lowmem.data.labels import Labels, no_labels
from nvae_lowmem.errors import ConfigError

_MAGIC, _MAGIC_OFFSET = (0xBEEFC0DE).to_bytes(4, "little"), 16
_TRAIN, _TEST = "train.lmdb", ("validation.lmdb", "test.lmdb")
_LOOK_AT = 16
"""Of so many values at least one must be an image."""
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")
_SAMPLE_BYTES = 1024
_SMALLEST_ENTRY_BYTES = 9  # its place in the page and its head

# lmdb allows one open environment per file and process, but training and held-out images may be asked from the same.
_open: weakref.WeakValueDictionary[str, lmdb.Environment] = weakref.WeakValueDictionary()


def is_lmdb(path: Path) -> bool:
    """Whether a path is an LMDB: a folder with data.mdb, or such a file."""
    file = path / "data.mdb" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            return opened.read(_MAGIC_OFFSET + 4)[_MAGIC_OFFSET:] == _MAGIC or file.name == "data.mdb"
    except OSError:
        return False


def find_parts(folder: Path) -> tuple[Path | None, Path | None]:
    """(train.lmdb, validation.lmdb) in a folder, as the published NVAE lays them out; None for what is missing."""
    train = folder / _TRAIN
    tests = [folder / name for name in _TEST if is_lmdb(folder / name)]
    return (train if is_lmdb(train) else None), (tests[0] if tests else None)


class LmdbStore:
    """The images of one LMDB. Raises ConfigError where it cannot be opened or holds something else."""

    def __init__(self, path: Path, white: float = 0.0) -> None:
        self._path, self._white = path, white
        self._environment = _environment(path)
        self._count = int(self._environment.stat()["entries"])
        values = [self._value(index) for index in range(min(self._count, _LOOK_AT))]
        if not values or values[0] is None:
            raise ConfigError(
                f"LMDB {str(path)!r} has {self._count:,} entries, but none with the key '0': images are expected under "
                "the keys '0', '1', '2' and so on"
            )
        self._holds_files = self._looks_like_files([value for value in values if value])
        kind = "image files" if self._holds_files else "images"
        self.description = f"LMDB {str(path)!r} with {self._count:,} {kind}"

    def labels(self) -> Labels:
        raise no_labels(self.description)

    def _looks_like_files(self, values: list[bytes]) -> bool:
        """Whether the values are image files, not raw bytes. Raises ConfigError where they are neither."""
        for index, value in enumerate(values):
            # any bytes could be a TGA, which has no signature: bytes of a square are no file unless they begin like one
            if _side(value) and not value.startswith(_SIGNATURES):
                return False
            try:
                decode(value, self.name(index), self._white)
            except UnreadableImage:
                continue
            return True
        if any(map(_side, values)):
            return False
        size = f"{len(values[0]):,} bytes" if values else "no bytes"
        raise ConfigError(
            f"LMDB {str(self._path)!r}: the value of key '0' has {size}, which is no square RGB image (side x side x 3 "
            "raw bytes) and no image file: write it anew, or give the images as a folder or ZIP"
        )

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"key '{index}' of LMDB {str(self._path)!r}"

    def identity(self, index: int) -> bytes:
        """From three samples of the value: to read all of them would take minutes where an LMDB has many gigabytes."""
        key = str(index).encode()
        try:
            with self._environment.begin(buffers=True) as transaction:  # the value stays in the file
                value = memoryview(transaction.get(key, key))
                middle = len(value) // 2
                parts = (value[:_SAMPLE_BYTES], value[middle : middle + _SAMPLE_BYTES], value[-_SAMPLE_BYTES:])
                return hashlib.sha256(b"".join([b"%d " % len(value), *parts])).digest()
        except lmdb.Error as error:
            raise self._damaged(error) from error

    def image(self, index: int) -> Image.Image:
        value = self._value(index)
        if value is None:
            raise UnreadableImage(f"{self.name(index)}: no such key")
        if self._holds_files:
            return decode(value, self.name(index), self._white)
        side = _side(value)
        if not side:
            raise UnreadableImage(f"{self.name(index)}: {len(value):,} bytes are no square RGB image")
        return Image.frombytes("RGB", (side, side), value)

    def _value(self, index: int) -> bytes | None:
        try:
            with self._environment.begin() as transaction:
                return transaction.get(str(index).encode())
        except lmdb.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: lmdb.Error) -> ConfigError:
        return ConfigError(f"LMDB {str(self._path)!r} is damaged: {error}; copy or write it again")


def _side(value: bytes) -> int:
    """Pixels per side of a square RGB image of so many bytes, 0 where there is none."""
    side = math.isqrt(len(value) // 3)
    return side if side * side * 3 == len(value) and len(value) <= MAX_FILE_BYTES else 0


def _environment(path: Path) -> lmdb.Environment:
    real = os.path.realpath(path)
    if real in _open:
        return _open[real]
    try:
        environment = lmdb.open(real, subdir=os.path.isdir(real), readonly=True, lock=False, readahead=False)
    except (lmdb.Error, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8, under some versions
        raise ConfigError(f"LMDB {str(path)!r} cannot be opened: {error}; copy or write it again") from error
    file = os.path.join(real, "data.mdb") if os.path.isdir(real) else real
    entries, page_bytes = environment.stat()["entries"], environment.stat()["psize"]
    file_bytes, wanted_bytes = os.path.getsize(file), (environment.info()["last_pgno"] + 1) * page_bytes
    problem = ""
    if file_bytes < wanted_bytes:  # reading beyond the end of a mapped file would kill the process
        problem = f"is cut off: {file_bytes:,} of {wanted_bytes:,} bytes; copy it again"
    elif entries * _SMALLEST_ENTRY_BYTES > file_bytes:
        problem = f"is damaged: it claims {entries:,} entries in {file_bytes:,} bytes; copy it again"
    elif not _is_walkable(real):
        problem = "is damaged: a process that went through it died; copy or write it again"
    if problem:
        environment.close()
        raise ConfigError(f"LMDB {str(path)!r} {problem}")
    _open[real] = environment
    return environment


# What a process of its own does with an untrusted LMDB, before ours does: a damaged page leads lmdb beyond the end of
# the mapped file, and the system ends whoever reads there. A value's first and last byte tell for all of it.
_WALK = """
import sys
try:
    import lmdb, os
    folder = os.path.isdir(sys.argv[1])
    with lmdb.open(sys.argv[1], subdir=folder, readonly=True, lock=False, readahead=False) as opened:
        with opened.begin(buffers=True) as transaction:
            for index in range(opened.stat()["entries"]):
                value = transaction.get(b"%d" % index)
                if value:
                    value[0], value[-1]
except Exception:
    pass  # our own process meets it, too, and has words for it
"""


def _is_walkable(real: str) -> bool:
    """Whether a process survives going through all values of an LMDB."""
    command = [sys.executable, "-c", _WALK, real]
    try:
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:  # no process can be started here
        return True
    return ended.returncode == 0
