"""A look at images before anything is decided about them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.data.look import LOOKED_AT, look_at, seen_by_training, spread
from nvae_lowmem.errors import ConfigError


def folder_of(path: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> DataConfig:
    """Noise of these widths and heights."""
    path.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path / f"{number}.png")
    return DataConfig(source=str(path))


def test_sizes_colours_and_what_the_crop_leaves_out_are_found(tmp_path: Path) -> None:
    look = look_at(folder_of(tmp_path / "a", [(40, 20), (30, 30), (200, 100), (50, 50)]))
    assert (look.looked_at, look.unreadable, look.grey, look.channels, look.has_test_part) == (4, 0, 0, 3, False)
    assert look.least_size == (40, 20) and look.most_size == (200, 100) and not look.same_size
    assert look.lost_share == 0.25 and look.most_lost_share == 0.5
    assert look.native_side == 20 and not look.binary_like and look.levels == 256


@pytest.mark.parametrize(("side", "native"), [(28, 28), (33, 34), (64, 64), (65, 64), (300, 64)])
def test_small_images_keep_their_own_size_and_others_become_64(side: int, native: int, tmp_path: Path) -> None:
    assert look_at(folder_of(tmp_path / "a", [(side, side)] * 2)).native_side == native


def test_grey_images_are_grey_and_one_in_colour_makes_the_set_one_in_colour(tmp_path: Path) -> None:
    config = folder_of(tmp_path / "a", [(20, 20)] * 3, "L")
    assert look_at(config).channels == 1
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "a" / "red.png")
    assert look_at(config).channels == 3


def test_digits_are_like_black_and_white_and_grey_noise_is_not(tmp_path: Path) -> None:
    digits = look_at(DataConfig(source="mnist5k"))
    assert digits.binary_like and digits.images == 4500 and digits.has_test_part and digits.native_side == 28
    assert not look_at(folder_of(tmp_path / "a", [(20, 20)] * 3, "L")).binary_like


def test_drawings_in_black_and_white_have_two_values(tmp_path: Path) -> None:
    look = look_at(folder_of(tmp_path / "a", [(20, 20)] * 3, "1"))
    assert look.levels == 2 and look.binary_like


def test_the_size_of_aligned_celeba_is_known(tmp_path: Path) -> None:
    assert look_at(folder_of(tmp_path / "a", [(178, 218)] * 2)).is_aligned_celeba
    assert not look_at(folder_of(tmp_path / "b", [(178, 218), (178, 178)])).is_aligned_celeba


def test_a_huge_folder_is_counted_and_only_some_of_it_decoded(tmp_path: Path) -> None:
    config = folder_of(tmp_path / "a", [(20, 20)])
    for number in range(1, 1000):
        os.link(tmp_path / "a" / "0.png", tmp_path / "a" / f"{number}.png")
    look = look_at(config)
    assert look.looked_at == LOOKED_AT and look.images == 1000 and look.training_images(config) == 950


def test_large_images_are_not_all_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvae_lowmem.data.look._MOST_PIXELS", 1000)
    assert look_at(folder_of(tmp_path / "a", [(20, 20)] * 9)).looked_at == 3


def test_unreadable_images_are_counted_and_a_set_of_them_is_refused(tmp_path: Path) -> None:
    config = folder_of(tmp_path / "a", [(20, 20)] * 3)
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    assert look_at(config).unreadable == 1
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of the 4 images looked at can be read"):
        look_at(config)


def test_what_training_sees_is_cropped_resized_and_in_the_models_bits(tmp_path: Path) -> None:
    config = folder_of(tmp_path / "a", [(40, 20)] * 5)
    model = ModelConfig(image_channels=3, image_size=16, bits=1)
    images = seen_by_training(Profile(model=model, data=config), 3)
    assert images.shape == (3, 3, 16, 16) and set(images.unique().tolist()) == {0.0, 1.0}
    five = seen_by_training(Profile(model=ModelConfig(image_channels=3, image_size=16, bits=5), data=config), 9)
    assert len(five) == 5 and torch.equal((five * 31).round() / 31, five)


@pytest.mark.parametrize(("total", "count"), [(0, 5), (3, 5), (5, 5), (1000, 7)])
def test_spread_numbers_are_different_and_reach_both_ends(total: int, count: int) -> None:
    numbers = spread(total, count)
    assert len(set(numbers)) == min(total, count) and sorted(numbers) == numbers
    assert not numbers or (numbers[0], numbers[-1]) == (0, total - 1)
