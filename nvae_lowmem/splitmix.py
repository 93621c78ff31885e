"""Random numbers without a state: hashes of integers, the same on every machine and for every version of the libraries.

Both are made of SplitMix64's constants (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
They differ, and neither can change: the order of images and the noise of every run that was ever trained come of them.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, elementwise: uint64 of any shape -> as many."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(_FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_SECOND)
    x ^= x >> np.uint64(31)
    return x


def seed_of(*numbers: int) -> int:
    """A 63-bit seed of integers, negative ones too: each is taken into the state, which is then mixed."""
    state = GOLDEN
    for number in numbers:
        state = (state ^ (number & MASK)) * _FIRST & MASK
        state = (state ^ (state >> 27)) * _SECOND & MASK
        state ^= state >> 31
    return state >> 1
