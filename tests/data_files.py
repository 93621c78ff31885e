"""Small image sets for the data tests, and the two ways to open one: it works, or it gives a message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.errors import ConfigError

GREY = ModelConfig(image_channels=1, image_size=8)
RGB = ModelConfig(image_channels=3, image_size=8)


def silent(_: str) -> None:
    pass


def colours(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_folder(folder: Path, count: int = 10, ending: str = ".png") -> np.ndarray:
    """`count` RGB images of 8 x 8; returns their pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = colours(count)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}{ending}")
    return pixels


def opened(
    source: Path | str, model: ModelConfig = RGB, log: Callable[[str], object] = silent, **config: Any
) -> Datasets:
    return open_source(DataConfig(source=str(source), **config), model, log=log)


def message(source: Path | str, model: ModelConfig = RGB, **config: Any) -> str:
    """The one paragraph that a mistake is answered with."""
    with pytest.raises(ConfigError) as caught:
        opened(source, model, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(datasets: Datasets) -> np.ndarray:
    """All images of both parts, sorted so that the split does not matter."""
    parts = [part.images(range(len(part))).numpy() for part in (datasets.train, datasets.test)]
    both = np.concatenate(parts)
    return both[np.lexsort(both.reshape(len(both), -1).T)]


def ordered(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) -> (N, 3, H, W), sorted in the same way."""
    planes = pixels.transpose(0, 3, 1, 2)
    return planes[np.lexsort(planes.reshape(len(planes), -1).T)]


def first(folder: Path, model: ModelConfig, **config: Any) -> np.ndarray:
    """(C, S, S): the first image of a folder, given also as the training part's first one."""
    return opened(folder, model, test_source=str(folder), **config).train.images([0])[0].numpy()


def single(tmp_path: Path, picture: Image.Image, name: str, model: ModelConfig, **config: Any) -> np.ndarray:
    picture.save(tmp_path / name)
    return first(tmp_path, model, **config)
