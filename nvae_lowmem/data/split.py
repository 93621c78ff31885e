"""Which images are held out: a property of each image, not of a run and not of its place among the others.

Another seed moves no image between the parts, nor does an image that is added: a training image never becomes a
held-out one, so that the figures of a run that goes on with more images stay figures on images it has not seen. (Where
less than one image would be held out, one is: the first in the order of hashes.)
"""

from __future__ import annotations

import hashlib

import numpy as np

from nvae_lowmem.data.randomness import Stream, keys
from nvae_lowmem.data.stores import Store

_SEED = 0


def by_identity(store: Store, fraction: float) -> tuple[np.ndarray, int]:
    """(numbers (N,) in the order of their identities' hashes, how many of the first ones are held out).

    An image is held out where its hash, as a number in [0, 1), is below `fraction`.
    """
    digests = (hashlib.blake2b(store.identity(i), digest_size=8).digest() for i in range(len(store)))
    hashes = np.frombuffer(b"".join(digests), dtype=">u8")
    return np.argsort(hashes, kind="stable"), int((hashes.astype(np.float64) < fraction * 2.0**64).sum())


def by_number(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(held-out numbers, the others) of `count` images that are what they are by their number alone, in order."""
    ranked = np.argsort(keys(_SEED, Stream.SPLIT, np.arange(count)), kind="stable")
    held_out = min(max(1, round(fraction * count)), count - 1)
    return np.sort(ranked[:held_out]), np.sort(ranked[held_out:])
