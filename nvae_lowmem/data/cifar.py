"""CIFAR-10's python batches: pickled dictionaries, read by an unpickler that can build arrays and nothing else."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from nvae_lowmem.data.labels import Labels, no_labels, numbered_labels
from nvae_lowmem.data.pickles import BadPickle, check_tuples
from nvae_lowmem.data.stores import ArrayStore
from nvae_lowmem.errors import ConfigError

_TRAIN = tuple(f"data_batch_{n}" for n in range(1, 6))
_TEST, _META = "test_batch", "batches.meta"
_VALUES = 3 * 32 * 32
_LARGEST_BYTES = 64 << 20  # a batch has 30 MiB
_MOST_ARRAYS = 16  # a batch has one


def find_batches(folder: Path) -> Path | None:
    """The folder itself or its sub-folder cifar-10-batches-py, whichever holds the batches."""
    for place in (folder, folder / "cifar-10-batches-py"):
        if any((place / name).is_file() for name in (*_TRAIN, _TEST)):
            return place
    return None


def read_batches(folder: Path) -> tuple[ArrayStore | None, ArrayStore | None]:
    """(training images, test images) of the batches that are there. Raises ConfigError for what cannot be read."""
    trains = [folder / name for name in _TRAIN if (folder / name).is_file()]
    tests = [folder / _TEST] if (folder / _TEST).is_file() else []
    where = f"CIFAR-10 batches in {str(folder)!r}"
    count = f" ({len(trains)} of 5 files)" if len(trains) < len(_TRAIN) else ""
    return _store(trains, f"the training part of {where}{count}"), _store(tests, f"the test part of {where}")


def _store(paths: list[Path], description: str) -> ArrayStore | None:
    if not paths:
        return None
    contents = [(path, _content(path)) for path in paths]
    pixels = np.concatenate([_pixels(content, path) for path, content in contents])
    labels = [content.get(b"labels", content.get("labels")) for _, content in contents]
    return ArrayStore(pixels, description, lambda: _labels(labels, paths, len(pixels), description))


def _labels(batches: list[Any], paths: list[Path], count: int, description: str) -> Labels:
    """The labels of all batches, with the names in batches.meta where that is there."""
    if not all(isinstance(labels, list) and all(type(n) is int and 0 <= n < 256 for n in labels) for labels in batches):
        raise no_labels(description)
    numbers = [number for labels in batches for number in labels]
    if len(numbers) != count:
        raise ConfigError(f"{description}: {len(numbers):,} labels for {count:,} images; download it again")
    meta = paths[0].with_name(_META)
    names = _content(meta).get(b"label_names", []) if meta.is_file() else []
    if not (isinstance(names, list) and len(names) <= 256 and all(isinstance(name, bytes) for name in names)):
        names = []
    return numbered_labels(numbers, description, [name.decode("utf-8", "replace") for name in names])


def _content(path: Path) -> dict[Any, Any]:
    """The dictionary in one file."""
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"CIFAR-10 batch {str(path)!r} is larger than {_LARGEST_BYTES >> 20} MiB: it is none")
        data = path.read_bytes()
        check_tuples(io.BytesIO(data))
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except ConfigError:
        raise
    except BadPickle as error:
        raise ConfigError(f"CIFAR-10 batch {str(path)!r} cannot be read: {error}; download it again") from None
    except _Forbidden as error:
        raise ConfigError(
            f"CIFAR-10 batch {str(path)!r} wants to run {error}, which no batch of images needs: it was not run; "
            "do not use this file, download CIFAR-10 (python version) from its own site"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ConfigError(f"CIFAR-10 batch {str(path)!r} cannot be read: {error!r}; download it again") from error
    return content if isinstance(content, dict) else {}


def _pixels(content: dict[Any, Any], path: Path) -> np.ndarray:
    """(N, 3, 32, 32) uint8 of one batch."""
    pixels = content.get(b"data", content.get("data"))
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == _VALUES
        and len(pixels)
    ):
        raise ConfigError(
            f"CIFAR-10 batch {str(path)!r} has no uint8 array 'data' of (images, {_VALUES}) in it: "
            "download CIFAR-10 (python version) again"
        )
    return pixels.reshape(-1, 3, 32, 32)


class _Forbidden(Exception):
    """A pickle names something that is not needed to build arrays; the text is its name."""


class _ArrayUnpickler(pickle.Unpickler):
    """Plain values (numbers, text, bytes, lists, dictionaries) and numpy arrays; everything else is refused.

    All sizes follow from bytes in the file: an array starts empty and takes its shape together with its bytes, and what
    a few bytes may ask for again and again (arrays, bytes made from text) is counted.
    """

    def __init__(self, file: io.BytesIO, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._arrays = self._converted = 0
        self._allowed: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): self._empty_array,
            ("numpy._core.multiarray", "_reconstruct"): self._empty_array,
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): self._latin_1,
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None

    def _empty_array(self, kind: Any, shape: Any, code: Any) -> np.ndarray:
        """What numpy's own reconstruction starts from."""
        self._arrays += 1
        if kind is not _NDARRAY or shape != (0,) or code not in (b"b", "b") or self._arrays > _MOST_ARRAYS:
            raise _Forbidden("an array construction that numpy does not write")
        return np.ndarray((0,), dtype=np.int8)

    def _latin_1(self, text: str, encoding: str = "latin1") -> bytes:
        """bytes in pickles of protocol 2 by Python 3: a call of _codecs.encode(text, "latin1")."""
        if encoding != "latin1" or not isinstance(text, str):
            raise _Forbidden(f"_codecs.encode with {encoding!r}")
        self._converted += len(text)
        if self._converted > _LARGEST_BYTES:
            raise _Forbidden("_codecs.encode on more text than a batch has")
        return text.encode("latin1")


class _Ndarray:
    """Stands for numpy.ndarray where a pickle names it: called, that would make an array of any size."""


_NDARRAY = _Ndarray()


def _dtype(code: Any, *flags: Any) -> np.dtype:
    text = code.decode("ascii") if isinstance(code, bytes) else code
    if (
        not isinstance(text, str)
        or not re.fullmatch(r"[a-zA-Z][0-9]{1,2}", text)
        or not all(f in (0, 1) for f in flags)
    ):
        raise _Forbidden(f"numpy.dtype with {code!r:.40}")
    return np.dtype(text)
