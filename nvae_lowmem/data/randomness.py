"""Random numbers without a state: a hash of (seed, stream, counters), the same on every machine and numpy version.

The hash is SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
chained over the counters; the words of one key are the SplitMix64 sequence that starts there.
"""

from __future__ import annotations

import enum

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Stream(enum.IntEnum):
    """What a number is for; two purposes never share numbers."""

    ORDER = 1
    FLIP = 2
    BINARISE = 3
    BINARISE_TEST = 4
    SPLIT = 5


def keys(seed: int, stream: Stream, *counters: int | np.ndarray) -> np.ndarray:
    """A 64-bit key for every combination of counters (integers or equally long 1-D arrays): (n,) uint64."""
    state = _mix(_words_of(seed))
    for counter in (int(stream), *counters):
        state = _mix(state ^ _mix(_words_of(counter) + np.uint64(_GOLDEN)))
    return state


def words(key: np.ndarray, count: int) -> np.ndarray:
    """`count` 64-bit words for each key: (n,) -> (n, count) uint64."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(key[:, None] + steps)


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
    return np.array([counter & _MASK], dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
