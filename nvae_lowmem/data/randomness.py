"""The data's random numbers, without a state: a hash of (seed, stream, counters).

The hash is SplitMix64's finaliser (`splitmix.mix`), chained over the counters; the words of one key are the SplitMix64
sequence that starts there.
"""

from __future__ import annotations

import enum

import numpy as np

from nvae_lowmem.splitmix import GOLDEN, MASK, mix


class Stream(enum.IntEnum):
    """What a number is for; two purposes never share numbers."""

    ORDER = 1
    FLIP = 2
    BINARISE = 3
    BINARISE_TEST = 4
    SPLIT = 5
    LABEL_DROPOUT = 6


def keys(seed: int, stream: Stream, *counters: int | np.ndarray) -> np.ndarray:
    """A 64-bit key for every combination of counters (integers or equally long 1-D arrays): (n,) uint64."""
    state = mix(_words_of(seed))
    for counter in (int(stream), *counters):
        state = mix(state ^ mix(_words_of(counter) + np.uint64(GOLDEN)))
    return state


def words(key: np.ndarray, count: int) -> np.ndarray:
    """`count` 64-bit words for each key: (n,) -> (n, count) uint64."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(key[:, None] + steps)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` images in an epoch: (count,) int64."""
    return np.argsort(keys(seed, Stream.ORDER, epoch, np.arange(count)), kind="stable")


def bernoulli(key: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Ones with probability grey / 255, exact to 2^-32: keys (n,), grey (n, count) uint8 -> (n, count) bool."""
    thresholds = (np.arange(256, dtype=np.uint64) << np.uint64(32)) // np.uint64(255)
    return (words(key, grey.shape[1]) >> np.uint64(32)) < thresholds[grey]


def _words_of(counter: int | np.ndarray) -> np.ndarray:
    """uint64, at least 1-D: numpy warns when a lone number wraps around, which is what is wanted here."""
    if isinstance(counter, np.ndarray):
        return counter.astype(np.uint64)
    return np.array([counter & MASK], dtype=np.uint64)
