"""MNIST's IDX files: a magic number, three dimensions, then one byte per pixel; plain or gzipped."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nvae_lowmem.data.labels import Labels, no_labels, numbered_labels
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
    pixels = _read(path, _pixels)
    return ArrayStore(pixels, f"IDX file {str(path)!r}", lambda: _labels_beside(path, len(pixels)))


def _read(path: Path, parse: Callable[[io.BufferedIOBase, Path], np.ndarray]) -> np.ndarray:
    try:
        with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as file:
            return parse(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"IDX file {str(path)!r} cannot be read: {error}; download or copy it again") from error


def _labels_beside(images: Path, count: int) -> Labels:
    """Of train-images-idx3-ubyte those in train-labels-idx1-ubyte, gzipped or not. Raises ConfigError without them."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    found = [path for path in (images.with_name(name), images.with_name(f"{name}.gz")) if path.is_file()]
    if not found or found[0] == images:
        raise no_labels(f"IDX file {str(images)!r}: there is no file {name} beside it, so it")
    labels = _read(found[0], _label_bytes)
    if len(labels) != count:
        raise ConfigError(
            f"IDX file {str(found[0])!r} has {len(labels):,} labels for {count:,} images in {images.name}"
        )
    return numbered_labels(labels, f"IDX file {str(found[0])!r}")


def _label_bytes(file: io.BufferedIOBase, path: Path) -> np.ndarray:
    """(N,) uint8."""
    header = file.read(8)
    if len(header) < 8 or struct.unpack(">I", header[:4])[0] != _LABELS_MAGIC:
        raise ConfigError(f"{str(path)!r} is not an IDX file of labels: it does not begin with 00 00 08 01")
    (count,) = struct.unpack(">I", header[4:])
    data = file.read(min(count, _LARGEST_BYTES) + 1)
    if len(data) != count:
        raise ConfigError(
            f"IDX file {str(path)!r} says that it holds {count:,} labels, and does not: download it again"
        )
    return np.frombuffer(data, dtype=np.uint8)


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
