"""MNIST's IDX files: a magic number, three dimensions, then one byte per pixel; plain or gzipped."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from nvae_lowmem.data.stores import ArrayStore
from nvae_lowmem.errors import ConfigError

_IMAGES_MAGIC, _LABELS_MAGIC = 0x00000803, 0x00000801
_LARGEST_BYTES = 1 << 30  # the largest published set in this format has half of it


def is_idx(path: Path) -> bool:
    """Whether a file is named or begins like an IDX file."""
    if "idx" in path.name and "ubyte" in path.name:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == struct.pack(">I", _IMAGES_MAGIC)
    except OSError:
        return False


def find_parts(folder: Path) -> tuple[Path | None, Path | None]:
    """(training images, test images) among the IDX files of a folder, by name; (None, None) where there are none."""
    files = sorted(p for p in folder.iterdir() if "images" in p.name and "idx" in p.name and p.is_file())
    tests = [p for p in files if "t10k" in p.name or "test" in p.name]
    trains = [p for p in files if p not in tests]
    return (trains[0] if trains else None), (tests[0] if tests else None)


def read_images(path: Path) -> ArrayStore:
    """The images of one IDX file. Raises ConfigError saying what is wrong with it."""
    try:
        with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as file:
            return ArrayStore(_pixels(file, path), f"IDX file {str(path)!r}")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"IDX file {str(path)!r} cannot be read: {error}; download or copy it again") from error


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _pixels(file: io.BufferedIOBase, path: Path) -> np.ndarray:
    """(N, 1, H, W) uint8."""
    header = file.read(16)
    magic = struct.unpack(">I", header[:4])[0] if len(header) >= 4 else None
    if magic == _LABELS_MAGIC:
        raise ConfigError(f"IDX file {str(path)!r} holds labels; name the file with images in it (idx3)")
    if magic != _IMAGES_MAGIC or len(header) < 16:
        raise ConfigError(
            f"{str(path)!r} is not an IDX file of images: it begins with {header[:4].hex(' ') or 'nothing'}, "
            "not with 00 00 08 03; check what was downloaded"
        )
    count, height, width = struct.unpack(">III", header[4:])
    wanted_bytes = math.prod((count, height, width))
    shape = f"{count:,} images of {height} x {width} pixels"
    if not 0 < wanted_bytes <= _LARGEST_BYTES:
        raise ConfigError(
            f"IDX file {str(path)!r} says that it holds {shape}; from 1 byte to {_LARGEST_BYTES >> 30} GiB are "
            "accepted: the file is damaged or not what it seems"
        )
    data = file.read(wanted_bytes + 1)
    if len(data) != wanted_bytes:
        state = f"ends after {len(data):,} bytes" if len(data) < wanted_bytes else "goes on after them"
        raise ConfigError(
            f"IDX file {str(path)!r} says that it holds {shape} = {wanted_bytes:,} bytes, but {state}: "
            "download it again"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(count, 1, height, width)
