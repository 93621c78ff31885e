"""Datasets: square uint8 images of the model's size, in memory where they fit, else decoded when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.data.decode import UnreadableImage, looks_grey
from nvae_lowmem.data.preparation import Preparation
from nvae_lowmem.data.stores import ArrayStore, Store
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.progress import Log, Progress

# Fixed, not taken from the memory that happens to be free: all processes of a run must decide alike.
IN_MEMORY_BYTES = 1 << 30
# Sets with fewer files are decoded once at the start, so that a damaged file is found before training, not in it.
VERIFY_BELOW = 20_000
_CHUNK = 64
_LOOK_AT = 16


class Dataset(Protocol):
    """Images of one part of the data (train or test)."""

    def __len__(self) -> int:
        """Images."""

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(B, C, S, S) uint8 of the given indices, 0 <= index < len."""

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64: the number of each image's class; None where no labels are asked for."""


class ArrayDataset:
    """Images in host memory; `pixels` is (N, C, S, S) uint8, labels (N,) int64 if there are any."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None) -> None:
        self._pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self._pixels)

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(self._pixels[np.asarray(indices, dtype=np.int64)])


class LazyDataset:
    """The images `numbers` of a store, decoded in parallel whenever they are asked for.

    An image that cannot be read then is replaced by the next one (of its class) that can, always the same one; the
    first time, a line says so.
    """

    def __init__(
        self, store: Store, numbers: np.ndarray, prepare: Preparation, log: Log, labels: np.ndarray | None = None
    ) -> None:
        """labels: of these images, (len(numbers),) int64."""
        self._store, self._numbers, self._prepare, self._log = store, numbers, prepare, log
        self.labels = labels
        self._threads = ThreadPoolExecutor(_thread_count(), thread_name_prefix="decode")
        self._warned = False

    def __len__(self) -> int:
        return len(self._numbers)

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        images = list(self._threads.map(self._image, np.asarray(indices, dtype=np.int64).tolist()))
        return torch.from_numpy(np.stack(images))

    def _image(self, index: int) -> np.ndarray:
        for step in range(len(self._numbers)):
            place = (index + step) % len(self._numbers)
            if self.labels is not None and self.labels[place] != self.labels[index]:
                continue
            number = int(self._numbers[place])
            try:
                return self._prepare(self._store.image(number), self._store.name(number))
            except (UnreadableImage, ConfigError) as error:
                self._warn(error)
        raise ConfigError(f"{self._store.description}: no image can be read any more; is the storage still there?")

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            self._log(f"warning: {error}; another image takes its place, and so with all that cannot be read")


def check_colours(store: Store, channels: int, key: str) -> None:
    """Raise ConfigError when the first images are all grey and the model wants RGB, or all in colour and it wants grey.

    A set that mixes both is no mistake: each image is converted.
    """
    images = []
    for number in range(min(len(store), _LOOK_AT)):
        try:
            images.append(store.image(number))
        except UnreadableImage:
            continue
    if channels == 3 and images and all(image.mode == "L" for image in images):
        found, wanted, change = "grey", "RGB (model.image_channels = 3)", "set model.image_channels = 1"
    elif channels == 1 and images and not any(looks_grey(image) for image in images):
        found, wanted, change = "in colour", "grey (model.image_channels = 1)", "set model.image_channels = 3"
    else:
        return
    raise ConfigError(
        f"{key}: the images of {store.description} are {found}, but the model is for {wanted} images: {change} "
        "(and model.bits, model.padding to match), or convert the images"
    )


def load(
    store: Store, numbers: np.ndarray, prepare: Preparation, log: Log, store_labels: np.ndarray | None = None
) -> tuple[Dataset, list[str]]:
    """(dataset of the images `numbers` of a store, what was skipped as unreadable); store_labels: of the whole store.

    In memory up to IN_MEMORY_BYTES. Larger sets are read when needed; those of fewer than VERIFY_BELOW images are
    decoded once here all the same, to find what cannot be read. The dataset may come out empty. Raises ConfigError for
    images that the settings do not fit.
    """
    shape = (prepare.channels, prepare.size, prepare.size)
    labels = store_labels[numbers] if store_labels is not None else None
    if isinstance(store, ArrayStore) and store.pixels.shape[1:] == shape and not prepare.crop_pixels:
        return ArrayDataset(store.pixels[numbers], labels), []
    in_memory = len(numbers) * int(np.prod(shape)) <= IN_MEMORY_BYTES
    if not in_memory and (len(numbers) >= VERIFY_BELOW or isinstance(store, ArrayStore)):  # nothing to find in arrays
        for _ in _decode_all(store, numbers[:_LOOK_AT], prepare, None):
            pass  # settings that do not fit the images are to fail now, not in the first step
        return LazyDataset(store, numbers, prepare, log, labels), []
    kept = np.empty((len(numbers), *shape), dtype=np.uint8) if in_memory else None
    progress = Progress("reading images" if in_memory else "checking images", len(numbers), log)
    good, skipped = np.ones(len(numbers), dtype=bool), []
    for start, problems in _decode_all(store, numbers, prepare, kept):
        for place, problem in problems:
            good[place] = False
            skipped.append(problem)
        progress.advance(min(_CHUNK, len(numbers) - start))
    labels = labels[good] if labels is not None else None
    if kept is not None:
        return ArrayDataset(kept if good.all() else kept[good], labels), skipped
    return LazyDataset(store, numbers[good], prepare, log, labels), skipped


def _decode_all(
    store: Store, numbers: np.ndarray, prepare: Preparation, kept: np.ndarray | None
) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Decode everything in threads, into `kept` if given; yields (start, [(place, problem)]) per chunk, in order."""

    def decode_chunk(start: int) -> tuple[int, list[tuple[int, str]]]:
        problems = []
        for place in range(start, min(start + _CHUNK, len(numbers))):
            number = int(numbers[place])
            try:
                pixels = prepare(store.image(number), store.name(number))
            except UnreadableImage as error:
                problems.append((place, str(error)))
            else:
                if kept is not None:
                    kept[place] = pixels
        return start, problems

    threads = ThreadPoolExecutor(_thread_count(), thread_name_prefix="decode")
    try:
        chunks: Iterable[int] = range(0, len(numbers), _CHUNK)
        yield from threads.map(decode_chunk, chunks)
    finally:  # an error, or Ctrl-C: do not decode the rest first
        threads.shutdown(wait=True, cancel_futures=True)


def _thread_count() -> int:
    return max(1, min(8, os.cpu_count() or 1))
