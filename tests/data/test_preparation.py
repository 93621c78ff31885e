"""What is done to one picture: upright, cropped, resized, grey or RGB; and what does not fit the settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_files import GREY, RGB, colours, first, message, opened, single, write_folder
from PIL import Image

from nvae_lowmem.config.model import ModelConfig

# -- what is done to a picture --


def test_the_largest_centred_square_is_cut_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = (200, 100, 50)
    image = single(tmp_path, Image.fromarray(wide), "wide.png", RGB)
    np.testing.assert_array_equal(image, np.broadcast_to(np.array([200, 100, 50])[:, None, None], (3, 8, 8)))


def test_crop_pixels_cuts_its_square_from_the_centre(tmp_path: Path) -> None:
    pixels = colours(1, 20)[0]
    image = single(tmp_path, Image.fromarray(pixels), "a.png", RGB, crop_pixels=8)
    np.testing.assert_array_equal(image, pixels[6:14, 6:14].transpose(2, 0, 1))


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255  # without a low-pass filter every eighth column would be all white or all black
    image = single(tmp_path, Image.fromarray(stripes), "a.png", GREY)
    assert abs(image[0, :, 1:-1].astype(int) - 127).max() <= 3


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    pixels = colours(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(first(tmp_path, RGB), pixels[::-1, ::-1].transpose(2, 0, 1))


GREEN = Image.new("RGB", (8, 8), (10, 200, 30))


@pytest.mark.parametrize(
    ("name", "picture", "expected", "slack"),
    [
        ("rgb.png", GREEN, (10, 200, 30), 0),
        ("rgb.webp", GREEN, (10, 200, 30), 12),
        ("rgb.jpg", GREEN, (10, 200, 30), 6),
        ("cmyk.jpg", GREEN.convert("CMYK"), (10, 200, 30), 6),
        ("palette.png", GREEN.quantize(4), (10, 200, 30), 0),
        ("opaque.png", GREEN.convert("RGBA"), (10, 200, 30), 0),
        ("clear.png", Image.new("RGBA", (8, 8), (10, 200, 30, 0)), (255, 255, 255), 0),
        ("half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127), 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_colour_picture_becomes_rgb_on_white(
    tmp_path: Path, name: str, picture: Image.Image, expected: tuple[int, int, int], slack: int
) -> None:
    image = single(tmp_path, picture, name, RGB)
    assert abs(image.astype(int) - np.array(expected)[:, None, None]).max() <= slack


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    GREEN.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    image = first(tmp_path, RGB)
    np.testing.assert_array_equal(image, np.broadcast_to(np.array([10, 200, 30])[:, None, None], (3, 8, 8)))


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (8, 8), 90),
        Image.new("LA", (8, 8), (90, 255)),
        Image.new("L", (8, 8), 90).quantize(4),
        Image.new("RGB", (8, 8), (90, 90, 90)),
    ],
    ids=lambda picture: picture.mode,
)
def test_every_kind_of_grey_picture_becomes_one_channel(tmp_path: Path, picture: Image.Image) -> None:
    np.testing.assert_array_equal(single(tmp_path, picture, "a.png", GREY), np.full((1, 8, 8), 90))


def test_black_and_white_pictures_become_0_and_255(tmp_path: Path) -> None:
    pixels = colours(1)[0, :, :, 0] > 127
    image = single(tmp_path, Image.fromarray(pixels), "a.png", GREY)
    np.testing.assert_array_equal(image[0], pixels * 255)


def test_sixteen_bit_pictures_keep_their_upper_eight_bits(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    image = single(tmp_path, Image.fromarray(values), "deep.png", GREY)
    np.testing.assert_array_equal(image[0], values >> 8)


def test_a_set_that_mixes_grey_and_colour_is_converted(tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    Image.new("L", (8, 8), 90).save(tmp_path / "000.png")
    assert opened(tmp_path).train.images([0]).shape == (1, 3, 8, 8)
    assert opened(tmp_path, GREY).train.images([0]).shape == (1, 1, 8, 8)


def test_the_published_crop_of_celeba_is_five_pixels_below_the_centred_one(tmp_path: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[40:188, 15:163] = np.arange(148)[:, None, None]
    picture = Image.fromarray(pixels)
    model = ModelConfig(image_channels=3, image_size=148)
    cut = single(tmp_path, picture, "a.png", model, crop="celeba")
    np.testing.assert_array_equal(cut, pixels[40:188, 15:163].transpose(2, 0, 1))
    centred = single(tmp_path, picture, "a.png", model, crop_pixels=148)
    np.testing.assert_array_equal(centred, pixels[35:183, 15:163].transpose(2, 0, 1))


# -- what does not fit --


def test_the_published_crop_of_celeba_is_for_its_aligned_images_only(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert "8 x 8 pixels" in message(tmp_path, crop="celeba") and "178 x 218" in message(tmp_path, crop="celeba")
    assert "is a fixed square" in message(tmp_path, crop="celeba", crop_pixels=4)


def test_grey_images_for_an_rgb_model_and_the_reverse_say_what_to_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "colour", 3)
    assert "model.image_channels = 3" in message(tmp_path / "colour", GREY)
    (tmp_path / "grey").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / "grey" / f"{i}.png")
    text = message(tmp_path / "grey", RGB)
    assert "grey" in text and "model.image_channels = 1" in text


def test_grey_pictures_saved_as_rgb_serve_a_grey_model(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("L", (8, 8), 40 * i).convert("RGB").save(tmp_path / f"{i}.png")
    assert opened(tmp_path, GREY).train.images([0]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_pictures_do_not_have_are_refused(tmp_path: Path, channels: int) -> None:
    write_folder(tmp_path)
    assert f"image_channels = {channels}" in message(tmp_path, ModelConfig(image_channels=channels, image_size=8))


def test_pictures_that_the_crop_settings_do_not_fit_are_named_with_their_size(tmp_path: Path) -> None:
    Image.new("RGB", (12, 9)).save(tmp_path / "odd.png")
    Image.new("RGB", (12, 12)).save(tmp_path / "right.png")
    for config in ({"crop": "none"}, {"crop_pixels": 10}):
        text = message(tmp_path, **config)
        assert "odd.png" in text and "12 x 9" in text and f"data.{next(iter(config))}" in text
    assert "data.crop_pixels = 8" in message(tmp_path, crop="none", crop_pixels=8)
