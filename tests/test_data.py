"""Folders and ZIPs of images: what is found, what is done to each picture, and what a user's mistake is answered."""

from __future__ import annotations

import os
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvae_lowmem.config import ConfigError, DataConfig, ModelConfig
from nvae_lowmem.data import dataset as dataset_module
from nvae_lowmem.data.progress import Progress
from nvae_lowmem.data.sources import Datasets, open_source

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


# -- what is found --


def test_folder_is_searched_below_and_hidden_and_other_files_are_not_images(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path / "a" / "b", 9)
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "0.png").write_bytes(b"no image")
    data = opened(tmp_path)
    np.testing.assert_array_equal(everything(data), ordered(pixels))
    assert "9 image files" in data.description and str(tmp_path) in data.description


def test_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 6)
    os.symlink(tmp_path, tmp_path / "images" / "again", target_is_directory=True)
    assert "6 image files" in opened(tmp_path).description


def test_zip_gives_the_same_images_as_its_folder(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path / "f", 12)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        packed.writestr("dataset.json", '{"labels": null}')
        packed.writestr("__MACOSX/._000.png", b"resource fork")
        for path in (tmp_path / "f").iterdir():
            packed.write(path, f"00000/{path.name}")
    from_zip, from_folder = opened(tmp_path / "set.zip"), opened(tmp_path / "f")
    np.testing.assert_array_equal(everything(from_zip), ordered(pixels))
    for part in ("train", "test"):
        a, b = getattr(from_zip, part), getattr(from_folder, part)
        np.testing.assert_array_equal(a.images(range(len(a))), b.images(range(len(b))))


# -- the two parts --


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(2, 0.05, 1), (40, 0.05, 2), (10, 0.5, 5), (2, 0.99, 1)])
def test_a_fixed_share_is_held_out_at_least_one_image(
    tmp_path: Path, count: int, fraction: float, held_out: int
) -> None:
    pixels = write_folder(tmp_path, count)
    data = opened(tmp_path, test_fraction=fraction)
    assert (len(data.train), len(data.test)) == (count - held_out, held_out)
    np.testing.assert_array_equal(everything(data), ordered(pixels))  # nothing lost, nothing twice
    again = opened(tmp_path, test_fraction=fraction)
    np.testing.assert_array_equal(data.test.images(range(held_out)), again.test.images(range(held_out)))


def test_test_source_is_held_out_whole_and_max_images_limits_training_only(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path / "train", 10)
    write_folder(tmp_path / "test", 7)
    data = opened(tmp_path / "train", test_source=str(tmp_path / "test"), max_images=4)
    assert (len(data.train), len(data.test)) == (4, 7)
    np.testing.assert_array_equal(data.train.images(range(4)), pixels[:4].transpose(0, 3, 1, 2))


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


# -- mistakes and damage --


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


def test_damaged_images_are_named_and_skipped(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path, 10)
    for name, keep in (("003.png", 60), ("004.png", 0)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    Image.fromarray(colours(1, 64)[0]).save(tmp_path / "photo.jpg")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:900])
    lines: list[str] = []
    data = opened(tmp_path, log=lines.append)
    assert "3 unreadable images skipped" in data.description
    assert len(lines) == 1 and all(name in lines[0] for name in ("003.png", "004.png", "photo.jpg"))
    np.testing.assert_array_equal(everything(data), ordered(np.delete(pixels, [3, 4], axis=0)))


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_set_is_refused_only_when_too_little_is_left(tmp_path: Path, survivors: int) -> None:
    write_folder(tmp_path, 12)
    for path in sorted(tmp_path.iterdir())[survivors:]:
        path.write_bytes(b"gone")
    if survivors < 2:
        assert "cannot be read" in message(tmp_path) and "two readable images" in message(tmp_path)
    else:
        data = opened(tmp_path)
        assert (len(data.train), len(data.test)) == (1, 1)


def test_damaged_and_locked_members_of_a_zip(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 5)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for path in sorted((tmp_path / "f").iterdir()):
            packed.write(path, path.name)
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[content.index(b"IHDR") + 30] ^= 0xFF  # inside the first member: its check sum no longer fits
    (tmp_path / "damaged.zip").write_bytes(content)
    data = opened(tmp_path / "damaged.zip")
    assert "1 unreadable" in data.description and len(data.train) + len(data.test) == 4
    for member in range(5):  # bit 0 of a member's flags says that it is encrypted
        place = [i for i in range(len(content)) if content.startswith(b"PK\x01\x02", i)][member]
        content[place + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    assert "without a password" in message(tmp_path / "locked.zip")


def test_files_that_are_far_too_large_are_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path, 5)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # takes no disk space
    data = opened(tmp_path)
    assert "1 unreadable" in data.description and len(data.train) + len(data.test) == 5


def test_missing_and_useless_sources_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("x")
    (tmp_path / "fake.zip").write_bytes(b"this is not a zip file at all")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    (tmp_path / "notes.dat").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    for name, said in {
        "nowhere/at/all": "does not exist",
        "empty": "it is empty",
        "texts": "3 files with .txt",
        "fake.zip": "cannot be read as a ZIP",
        "empty.zip": "it is empty",
        "notes.dat": "not a kind of file",
        "one.png": "name the folder",
    }.items():
        text = message(tmp_path / name)
        assert said in text and str(tmp_path / name) in text


def test_unknown_names_get_the_nearest_embedded_set() -> None:
    assert "did you mean 'mnist5k'" in message("mnist5")
    assert "--data" in message("celeba64")


def test_a_missing_test_source_is_named_by_its_own_key(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert message(tmp_path, test_source=str(tmp_path / "no")).startswith("data.test_source")


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_image_bombs_are_refused_by_name(tmp_path: Path, side: int) -> None:
    write_folder(tmp_path)
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    text = message(tmp_path)
    assert "bomb.png" in text and "decompression bomb" in text


# -- sets that are too large for memory --


def test_large_sets_are_read_when_needed_and_hold_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, 20)
    (tmp_path / "005.png").write_bytes(b"gone")
    in_memory = opened(tmp_path)
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    lazy = opened(tmp_path)
    assert isinstance(lazy.train, dataset_module.LazyDataset)
    assert "1 unreadable" in lazy.description
    for a, b in ((in_memory.train, lazy.train), (in_memory.test, lazy.test)):
        np.testing.assert_array_equal(a.images(range(len(a))), b.images(range(len(b))))


def test_an_unreadable_image_of_an_unchecked_set_is_replaced_by_the_next_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_folder(tmp_path, 20)
    for i in (4, 5, 9):
        (tmp_path / f"{i:03d}.png").write_bytes(b"gone")
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(dataset_module, "VERIFY_BELOW", 0)
    write_folder(tmp_path.with_name("held-out"), 2)
    lines: list[str] = []
    data = opened(tmp_path, log=lines.append, test_source=str(tmp_path.with_name("held-out")))
    assert len(data.train) == 20 and not lines
    for _ in range(2):
        images = data.train.images([3, 4, 5, 9])
        np.testing.assert_array_equal(images, pixels[[3, 6, 6, 10]].transpose(0, 3, 1, 2))
    assert len(lines) == 1 and "another image takes its place" in lines[0]


def test_settings_that_do_not_fit_an_unchecked_set_fail_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(dataset_module, "VERIFY_BELOW", 0)
    assert "data.crop_pixels = 9" in message(tmp_path, crop_pixels=9)


def test_reading_stops_at_the_first_error_and_leaves_no_thread_behind(tmp_path: Path) -> None:
    write_folder(tmp_path, 300)
    Image.new("RGB", (12, 9)).save(tmp_path / "000.png")
    before = threading.active_count()
    assert "000.png" in message(tmp_path, crop="none")
    assert threading.active_count() == before


def test_progress_tells_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 11.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    progress = Progress("drawing", 4, lines.append, every_seconds=5.0)
    for _ in range(4):
        progress.advance()
    assert lines == ["drawing: 2 of 4 (50 %), 10.0 s left"]
