"""Batches: what they hold is a function of (seed, step, slot), however processes and micro-batches share them out."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.dataset import ArrayDataset
from nvae_lowmem.data.pipeline import Batches, evaluation_batches, prefetched, steps_per_epoch
from nvae_lowmem.data.randomness import Stream, bernoulli, keys, permutation, words

PLAIN = DataConfig(dynamic_binarisation=False)
PIXEL = ModelConfig(image_channels=1, image_size=1)


def numbered(count: int) -> ArrayDataset:
    """Image i is one pixel of value i."""
    return ArrayDataset(np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1))


def textured(count: int, channels: int = 1, size: int = 6) -> ArrayDataset:
    return ArrayDataset(np.random.default_rng(5).integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def numbers(x: torch.Tensor) -> list[int]:
    return (x.flatten() * 255).round().int().tolist()


# -- order --


@settings(max_examples=40, deadline=None)
@given(images=st.integers(1, 40), total=st.integers(1, 60), seed=st.integers(-5, 2**70))
def test_every_epoch_holds_every_image_once_whatever_the_batch(images: int, total: int, seed: int) -> None:
    batches = Batches(numbered(images), PIXEL, PLAIN, total, seed)
    steps = math.ceil(3 * images / total)
    drawn = [n for step in range(steps) for n in numbers(batches.batch(step, slice(0, total)))]
    for epoch in range(3):
        assert sorted(drawn[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must go on with the images it would have had: these numbers are part of the file format."""
    assert permutation(1, 0, 10).tolist() == [9, 2, 0, 8, 5, 3, 7, 6, 4, 1]
    assert words(keys(7, Stream.FLIP, 3, 2), 2).tolist() == [[0x82870E38EC3156FC, 0x8469F60FCF012266]]


def test_words_are_the_published_splitmix64_sequence() -> None:
    start = np.array([0, 1234567], dtype=np.uint64)
    assert words(start, 2).tolist() == [
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4],
        [6457827717110365317, 3203168211198807973],
    ]


def test_steps_per_epoch_is_at_least_one() -> None:
    assert [steps_per_epoch(n, 100) for n in (1, 99, 100, 4500)] == [1, 1, 1, 45]


# -- one total batch, many ways to share it out --


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 10**6),
    cuts=st.lists(st.integers(1, 11), max_size=5, unique=True).map(sorted),
    bits=st.sampled_from([1, 5, 8]),
)
def test_any_split_into_slices_gives_the_same_images(step: int, cuts: list[int], bits: int) -> None:
    model = ModelConfig(image_size=6, padding=1, bits=bits)
    whole, shared = (Batches(textured(9), model, DataConfig(flip=True), 12, 3) for _ in range(2))
    starts, stops = [0, *cuts], [*cuts, 12]
    parts = [shared.batch(step, slice(a, b)) for a, b in zip(starts, stops, strict=True)]
    assert torch.equal(torch.cat(parts), whole.batch(step, slice(0, 12)))


def test_steps_can_be_asked_in_any_order() -> None:
    batches = Batches(textured(30), ModelConfig(image_size=6, bits=1), DataConfig(flip=True), 8, 3)
    forward = {step: batches.batch(step, slice(0, 8)) for step in range(20)}
    for step in (19, 0, 7, 3, 12):
        assert torch.equal(batches.batch(step, slice(0, 8)), forward[step])


@pytest.mark.parametrize("slots", [slice(0, 9), slice(-1, 4), slice(4, 4), slice(0, 8, 2)])
def test_slots_outside_the_total_batch_are_refused(slots: slice) -> None:
    with pytest.raises(ValueError, match="total batch is 8"):
        Batches(numbered(5), PIXEL, PLAIN, 8, 1).batch(0, slots)


# -- what is done to the images --


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_become_the_published_quantisation(bits: int) -> None:
    data = ArrayDataset(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))
    (x,) = evaluation_batches(data, ModelConfig(image_size=16, bits=bits), PLAIN, 1, 0)
    expected = [math.floor(v / 2 ** (8 - bits)) / (2**bits - 1) for v in range(256)]
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == torch.tensor(expected).tolist()


def test_one_bit_without_dynamic_binarisation_is_a_threshold_at_one_half() -> None:
    data = ArrayDataset(np.array([0, 127, 128, 255], dtype=np.uint8).reshape(4, 1, 1, 1))
    (x,) = evaluation_batches(data, ModelConfig(image_size=1, bits=1), PLAIN, 4, 0)
    assert x.flatten().tolist() == [0, 0, 1, 1]


def test_padding_is_zero_and_gives_the_size_of_the_network() -> None:
    model = ModelConfig(image_size=6, padding=2)
    x = Batches(ArrayDataset(np.full((3, 1, 6, 6), 255, np.uint8)), model, PLAIN, 3, 1).batch(0, slice(0, 3))
    assert x.shape == (3, 1, model.network_size, model.network_size)
    assert x[:, :, 2:8, 2:8].eq(1).all() and x.sum() == 3 * 36


def test_flips_mirror_half_of_the_images_and_only_when_asked() -> None:
    data = ArrayDataset(np.array([[[[0, 255]]]], dtype=np.uint8).repeat(2, axis=2))
    model = ModelConfig(image_size=2)
    plain = Batches(data, model, PLAIN, 4000, 1).batch(0, slice(0, 4000))
    assert plain[..., 1].eq(1).all()
    config = DataConfig(flip=True)
    flipped = Batches(data, model, config, 4000, 1).batch(0, slice(0, 4000))[:, 0, 0, 0]
    assert 0.45 < flipped.mean() < 0.55  # 6 standard deviations
    assert not torch.equal(flipped, Batches(data, model, config, 4000, 1).batch(1, slice(0, 4000))[:, 0, 0, 0])
    assert all(x[..., 1].eq(1).all() for x in evaluation_batches(data, model, config, 1, 1))


def test_dynamic_binarisation_draws_anew_in_every_step_with_the_grey_value_as_probability() -> None:
    grey = np.array([0, 51, 128, 204, 255], dtype=np.uint8)
    data = ArrayDataset(np.tile(grey, (1, 1, 5, 1)))
    batches = Batches(data, ModelConfig(image_size=5, bits=1), DataConfig(), 2000, 1)
    x, y = (batches.batch(step, slice(0, 2000)) for step in (0, 1))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    means = x.mean(dim=(0, 1, 2))  # 10,000 draws per column: standard deviation at most 0.005
    torch.testing.assert_close(means, torch.from_numpy(grey / 255).float(), atol=0.03, rtol=0)
    assert means[0] == 0 and means[-1] == 1
    assert not torch.equal(x, y)


# -- evaluation --


def test_evaluation_sees_every_image_once_in_order() -> None:
    found = [numbers(x) for x in evaluation_batches(numbered(10), PIXEL, PLAIN, 4, 1)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    first = [numbers(x) for x in evaluation_batches(numbered(10), PIXEL, PLAIN, 4, 1, count=6)]
    assert first == [[0, 1, 2, 3], [4, 5]]
    assert sum(len(x) for x in evaluation_batches(numbered(10), PIXEL, PLAIN, 4, 1, count=99)) == 10


def test_evaluation_binarises_once_and_for_all_whatever_the_batch_size() -> None:
    model = ModelConfig(image_size=6, padding=1, bits=1)
    alone, together = (
        torch.cat(list(evaluation_batches(textured(10), model, DataConfig(), size, 4))) for size in (1, 10)
    )
    assert torch.equal(alone, together)
    other_seed = torch.cat(list(evaluation_batches(textured(10), model, DataConfig(), 10, 5)))
    assert not torch.equal(alone, other_seed)


# -- the random numbers --


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_words_are_uniform_and_independent_between_pixels_slots_steps_seeds_and_streams(seed: int) -> None:
    slots, pixels = 400, 500
    u = words(keys(seed, Stream.BINARISE, 3, np.arange(slots)), pixels) / 2.0**64
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    expected = u.size / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 25 < chi_squared < 120  # 63 degrees of freedom: mean 63, standard deviation 11
    limit = 5 / math.sqrt(u.size)  # 5 standard deviations of the correlation of independent numbers
    assert _correlation(u[:, 1:], u[:, :-1]) < limit
    assert _correlation(u[1:], u[:-1]) < limit
    for other in (
        keys(seed, Stream.BINARISE, 4, np.arange(slots)),
        keys(seed + 1, Stream.BINARISE, 3, np.arange(slots)),
        keys(seed, Stream.BINARISE_TEST, 3, np.arange(slots)),
    ):
        assert _correlation(u, words(other, pixels) / 2.0**64) < limit
    assert abs(u.mean(axis=1) - 0.5).max() < 6 / math.sqrt(12 * pixels)  # no slot stands out


def test_each_bit_of_a_key_is_set_half_of_the_time() -> None:
    key = keys(1, Stream.FLIP, 0, np.arange(20_000))
    shares = np.array([(key >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)])
    assert abs(shares - 0.5).max() < 5 * 0.5 / math.sqrt(len(key))


def test_every_place_is_taken_by_every_image_equally_often() -> None:
    orders = np.stack([permutation(0, epoch, 8) for epoch in range(4000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    assert abs(counts - 500).max() < 5 * math.sqrt(500)


def test_bernoulli_is_certain_at_black_and_white() -> None:
    key = keys(0, Stream.BINARISE, 0, np.arange(100))
    assert not bernoulli(key, np.zeros((100, 50), np.uint8)).any()
    assert bernoulli(key, np.full((100, 50), 255, np.uint8)).all()


# -- prefetching --


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetching_gives_the_same_micro_batches_in_order_and_ends() -> None:
    batches = Batches(textured(30), ModelConfig(image_size=6, bits=1), DataConfig(flip=True), 8, 3)
    slices = [slice(0, 4), slice(4, 8)]
    found = list(prefetched(batches, 5, 9, slices, pin_memory=True))
    expected = [batches.batch(step, part) for step in range(5, 9) for part in slices]
    assert len(found) == 8
    assert all(torch.equal(a.x, b) for a, b in zip(found, expected, strict=True))
    assert [micro_batch.slot for micro_batch in found] == [0, 4] * 4
    assert not prefetch_threads()


def test_a_closed_prefetcher_leaves_no_thread() -> None:
    batches = Batches(numbered(30), PIXEL, PLAIN, 8, 3)
    waiting = prefetched(batches, 0, 10**9, [slice(0, 8)], depth=1)
    next(waiting)
    assert len(prefetch_threads()) == 1
    waiting.close()
    assert not prefetch_threads()


class _Breaks(ArrayDataset):
    def __init__(self) -> None:
        super().__init__(np.zeros((4, 1, 1, 1), np.uint8))
        self.calls = 0

    def images(self, indices):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls > 2:
            raise OSError("the disk is gone")
        return super().images(indices)


def test_what_goes_wrong_while_prefetching_is_raised_in_its_place() -> None:
    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for x in prefetched(Batches(_Breaks(), PIXEL, PLAIN, 4, 1), 0, 5, [slice(0, 4)]):
            found.append(x)
    assert len(found) == 2 and not prefetch_threads()


def test_nothing_to_draw_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batches"):
        Batches(numbered(0), PIXEL, PLAIN, 4, 1)
