"""From a dataset to batches: order, flips, bits and padding, all functions of (seed, step, slot).

The total batch of optimiser step s has `total_batch` slots. Slot k is draw n = s * total_batch + k of the whole run:
epoch n // N, place n % N in that epoch's order of the N images. So it does not matter how processes and micro-batches
share out the slots, and a resumed run needs no saved state.

Shapes: b images of a micro-batch, C channels, S pixels per side of the image, T = S + 2 padding inside the network.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.dataset import Dataset
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.data.randomness import Stream, bernoulli, keys, permutation


class MicroBatch(NamedTuple):
    """What one forward pass of training sees."""

    slot: int
    """The first image's sample slot within the total batch."""
    x: Tensor
    """(b, C, T, T) float32 in [0, 1]."""
    labels: Tensor | None = None
    """(b, classes + 1) float32, see `label_rows`; None where the model has no classes."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on the device; from page-locked memory without waiting."""
        x = self.x.to(device, non_blocking=True)
        return MicroBatch(self.slot, x, None if self.labels is None else self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory."""
        return MicroBatch(self.slot, self.x.pin_memory(), None if self.labels is None else self.labels.pin_memory())


def steps_per_epoch(images: int, total_batch: int) -> int:
    """Optimiser steps that count as one pass over the images; at least 1."""
    return max(1, images // total_batch)


class Batches:
    """The training batches of one run: `batch(step, slots)` gives any part of any step's batch, at any time."""

    def __init__(
        self,
        dataset: Dataset,
        model: ModelConfig,
        config: DataConfig,
        total_batch: int,
        seed: int,
        label_dropout: float = 0.0,
    ) -> None:
        """label_dropout: share of images that come without their label."""
        if len(dataset) < 1 or total_batch < 1:
            raise ValueError(f"no batches: {len(dataset)} images, {total_batch=}")
        self._dataset, self._model, self._config = dataset, model, config
        self._total_batch, self._seed, self._label_dropout = total_batch, seed, label_dropout
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, sample_slice: slice) -> Tensor:
        """(b, C, T, T) float32 in [0, 1] of the slots `sample_slice` of optimiser step `step`.

        Padding is zero. Raises ValueError for slots outside the total batch.
        """
        slots = np.arange(*self._bounds(step, sample_slice))
        images = self._dataset.images(self._indices(step * self._total_batch + slots))
        if self._config.flip:
            images = _flipped(images, keys(self._seed, Stream.FLIP, step, slots))
        key = keys(self._seed, Stream.BINARISE, step, slots)
        return to_network(images, self._model, key if self._config.dynamic_binarisation else None)

    def labels(self, step: int, sample_slice: slice) -> Tensor | None:
        """(b, classes + 1) float32: the labels of those slots; None where the model has no classes.

        A share label_dropout of them, drawn anew in every step, stands for "no class".
        """
        if not self._model.classes:
            return None
        slots = np.arange(*self._bounds(step, sample_slice))
        assert self._dataset.labels is not None, "a model with classes needs labels"
        numbers = self._dataset.labels[self._indices(step * self._total_batch + slots)]
        key = keys(self._seed, Stream.LABEL_DROPOUT, step, slots)
        dropped = (key >> np.uint64(11)) * 2.0**-53 < self._label_dropout
        return label_rows(np.where(dropped, -1, numbers), self._model.classes)

    def micro_batch(self, step: int, sample_slice: slice) -> MicroBatch:
        """Images and labels of those slots."""
        return MicroBatch(sample_slice.start or 0, self.batch(step, sample_slice), self.labels(step, sample_slice))

    def _bounds(self, step: int, sample_slice: slice) -> tuple[int, int]:
        start, stop = sample_slice.start or 0, self._total_batch if sample_slice.stop is None else sample_slice.stop
        if step < 0 or sample_slice.step not in (None, 1) or not 0 <= start < stop <= self._total_batch:
            raise ValueError(f"step {step} has no slots {sample_slice}: the total batch is {self._total_batch}")
        return start, stop

    def _indices(self, draws: np.ndarray) -> np.ndarray:
        """Dataset indices of global draws (b,)."""
        epochs, places = np.divmod(draws, len(self._dataset))
        indices = np.empty_like(draws)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[places[here]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self._seed, epoch, len(self._dataset))
            # A step rarely spans more than two epochs. A new dictionary, not a changed one: a prefetching thread may
            # be reading the old one.
            recent = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
            self._orders = {**recent, epoch: order}
        return order


def evaluation_batches(
    dataset: Dataset, model: ModelConfig, config: DataConfig, batch_size: int, seed: int, count: int = 0
) -> Iterator[Tensor]:
    """The first `count` images (0: all) once, in order, never flipped: (b, C, T, T) float32 in [0, 1]; the last batch
    may be smaller.

    Dynamic binarisation draws each image once and for all from (seed, index), whatever the batch size.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    wanted = min(count, len(dataset)) if count else len(dataset)
    for start in range(0, wanted, batch_size):
        indices = np.arange(start, min(start + batch_size, wanted))
        key = keys(seed, Stream.BINARISE_TEST, indices) if config.dynamic_binarisation else None
        yield to_network(dataset.images(indices), model, key)


def to_network(images: Tensor, model: ModelConfig, binarisation_key: np.ndarray | None) -> Tensor:
    """(b, C, S, S) uint8 -> (b, C, T, T) float32 in [0, 1] with model.bits bits and zero padding.

    x = floor(v / 2^(8 - bits)) / (2^bits - 1) for a byte v. With 1 bit and a key per image, each pixel is drawn as
    Bernoulli(v / 255) instead (dynamic binarisation).
    """
    if model.bits == 1 and binarisation_key is not None:
        grey = images.numpy().reshape(len(images), -1)
        x = torch.from_numpy(bernoulli(binarisation_key, grey)).reshape(images.shape).to(torch.float32)
    else:
        x = torch.from_numpy(_levels(model.bits)[images.numpy()])
    return functional.pad(x, (model.padding,) * 4) if model.padding else x


def without_padding(images: Tensor, model: ModelConfig) -> Tensor:
    """(B, C, T, T) -> (B, C, S, S): what `to_network` has put around the images taken off again; a view."""
    p = model.padding
    return images[:, :, p:-p, p:-p] if p else images


def as_rgb(images: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 3, S, S): RGB as it is, otherwise grey, the mean over channels."""
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _levels(bits: int) -> np.ndarray:
    """(256,) float32: what each byte becomes."""
    return ((np.arange(256) >> (8 - bits)) / ((1 << bits) - 1)).astype(np.float32)


def _flipped(images: Tensor, key: np.ndarray) -> Tensor:
    """Mirror left to right where the key's top bit is set: (b, C, S, S), (b,)."""
    chosen = torch.from_numpy(key >> np.uint64(63) == 1)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


class _Failed:
    """An exception on its way from the preparing thread to the caller."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def prefetched(
    batches: Batches, step: int, last_step: int, slices: Sequence[slice], *, depth: int = 2, pin_memory: bool = False
) -> Generator[MicroBatch, None, None]:
    """The micro-batches `slices` of the steps step, step + 1, ..., last_step - 1, one after the other.

    A thread prepares up to `depth` of them ahead. It ends when the iterator is exhausted, closed or dropped; what goes
    wrong in it is raised here. With pin_memory they are in page-locked memory where there is a CUDA device, so
    that copies to it can overlap with computing.
    """
    if depth < 1:
        raise ValueError(f"{depth=} must be at least 1")
    ready: queue.Queue[MicroBatch | _Failed | None] = queue.Queue(depth)
    stop = threading.Event()
    device = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None

    def put(item: MicroBatch | _Failed | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def prepare() -> None:
        try:
            if device is not None:
                # a new thread would use GPU 0, where every process of a node would then open a second context
                torch.cuda.set_device(device)
            for s in range(step, last_step):
                for sample_slice in slices:
                    if stop.is_set():
                        return
                    made = batches.micro_batch(s, sample_slice)
                    put(made if device is None else made.pin_memory())
            put(None)
        except BaseException as error:
            put(_Failed(error))

    thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join()
