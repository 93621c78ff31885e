"""Folders and ZIPs of images: what is found, how it is split, and what a user's mistake is answered."""

from __future__ import annotations

import os
import struct
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_files import colours, everything, message, opened, ordered, write_folder
from PIL import Image

from nvae_lowmem.data import dataset as dataset_module
from nvae_lowmem.progress import Progress

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
            packed.write(path, path.name)
    from_zip, from_folder = opened(tmp_path / "set.zip"), opened(tmp_path / "f")
    np.testing.assert_array_equal(everything(from_zip), ordered(pixels))
    for part in ("train", "test"):
        a, b = getattr(from_zip, part), getattr(from_folder, part)
        np.testing.assert_array_equal(a.images(range(len(a))), b.images(range(len(b))))


# -- the two parts --


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.05), (2, 0.99), (3, 1e-9), (40, 0.05), (40, 0.5)])
def test_both_parts_together_are_all_images_and_neither_is_empty(tmp_path: Path, count: int, fraction: float) -> None:
    pixels = write_folder(tmp_path, count)
    data = opened(tmp_path, test_fraction=fraction)
    assert len(data.train) and len(data.test)
    np.testing.assert_array_equal(everything(data), ordered(pixels))  # nothing lost, nothing twice
    again = opened(tmp_path, test_fraction=fraction)
    np.testing.assert_array_equal(data.test.images([0]), again.test.images([0]))


def test_test_source_is_held_out_whole_and_max_images_limits_training_only(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path / "train", 10)
    write_folder(tmp_path / "test", 7)
    data = opened(tmp_path / "train", test_source=str(tmp_path / "test"), max_images=4)
    assert (len(data.train), len(data.test)) == (4, 7)
    np.testing.assert_array_equal(data.train.images(range(4)), pixels[:4].transpose(0, 3, 1, 2))


# -- mistakes and damage --


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


def test_a_pipe_among_the_images_is_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path, 5)
    os.mkfifo(tmp_path / "pipe.png")
    assert "1 unreadable" in opened(tmp_path).description


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX systems only")
def test_names_of_any_bytes_are_read_and_shown_escaped(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pics\xff"))
    write_folder(folder, 6)
    (folder / "000.png").rename(folder / os.fsdecode(b"\xe9\x1b[31m.png"))
    (folder / "001.png").write_bytes(b"gone")
    (folder / "001.png").rename(folder / os.fsdecode(b"\xe9\x1b[32m.png"))
    lines: list[str] = []
    data = opened(folder, log=lines.append)
    assert len(data.train) + len(data.test) == 5
    assert len(lines) == 1 and r"\xe9\x1b[32m.png" in lines[0] and r"pics\xff" in lines[0]
    assert (lines[0] + data.description).isprintable()
    (folder / os.fsdecode(b"\xff.txt")).write_text("x")
    assert message(folder / os.fsdecode(b"\xff.txt")).isprintable()


def test_a_name_with_a_zero_byte_is_no_folder() -> None:
    assert r"pics\x00" in message("pics\0") and message("pics\0").isprintable()


def test_missing_and_useless_sources_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("x")
    (tmp_path / "fake.zip").write_bytes(b"this is not a zip file at all")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    (tmp_path / "notes.dat").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    os.mkfifo(tmp_path / "pipe.zip")
    for name, said in {
        "pipe.zip": "neither a file nor a folder",
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
    text = message("celeba64")
    assert "--data" in text and "docs/data.md" in text and "unknown" not in text


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
