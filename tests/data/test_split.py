"""Held-out membership follows the image, never its place; a run's data have a fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from data_files import RGB, colours, opened, write_folder
from PIL import Image

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.fingerprint import FILE_NAME, record_or_compare
from nvae_lowmem.data.sources import Datasets
from nvae_lowmem.data.split import by_identity, by_number
from nvae_lowmem.data.stores import ArrayStore, FolderStore


def pixels_of(part: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images(range(len(part)))}


@pytest.mark.parametrize("added", ["000a.png", "zzz.png", "sub/folder.png"])
def test_an_added_image_moves_no_other_one_between_the_parts(tmp_path: Path, added: str) -> None:
    write_folder(tmp_path, 100)
    before = opened(tmp_path, test_fraction=0.1)
    assert 2 < len(before.test) < 25
    (tmp_path / added).parent.mkdir(exist_ok=True)
    Image.fromarray(colours(1, seed=9)[0]).save(tmp_path / added)
    after = opened(tmp_path, test_fraction=0.1)
    assert pixels_of(before.train) <= pixels_of(after.train)
    assert pixels_of(before.test) <= pixels_of(after.test)


def test_no_training_image_is_ever_held_out_later_however_the_set_grows(tmp_path: Path) -> None:
    """Also where the share is less than one image, and the first in the order of hashes is held out."""
    generator = np.random.default_rng(5)
    trained: set[bytes] = set()
    for number in generator.permutation(40):
        Image.fromarray(colours(1, seed=100 + number)[0]).save(tmp_path / f"{number:03d}.png")
        if len(list(tmp_path.iterdir())) >= 2:
            data = opened(tmp_path, test_fraction=0.05)
            assert not trained & pixels_of(data.test)
            trained = pixels_of(data.train)


def test_the_split_is_the_same_for_a_moved_folder_and_for_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a" / "b", 30)
    before = opened(tmp_path / "a", test_fraction=0.2)
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    after = opened("elsewhere", test_fraction=0.2)
    assert pixels_of(before.test) == pixels_of(after.test) and before.fingerprint == after.fingerprint


def test_images_without_names_are_known_by_what_they_hold(tmp_path: Path) -> None:
    """An LMDB written anew with one more image in front: all its keys are others."""
    images = list(colours(40, 16))
    for name, values in (("a", images), ("b", [colours(1, 16, seed=7)[0], *images])):
        with lmdb.open(str(tmp_path / name), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
            for i, image in enumerate(values):
                writer.put(str(i).encode(), image.tobytes())
    model = ModelConfig(image_channels=3, image_size=16)
    before, after = (opened(tmp_path / name, model, test_fraction=0.2) for name in "ab")
    assert pixels_of(before.train) <= pixels_of(after.train) and pixels_of(before.test) <= pixels_of(after.test)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.9])
def test_about_the_asked_share_is_held_out(fraction: float) -> None:
    values = np.arange(20_000, dtype=np.uint32).view(np.uint8).reshape(-1, 1, 1, 4)
    ranked, count = by_identity(ArrayStore(values, "numbers"), fraction)
    assert sorted(ranked) == list(range(20_000))
    assert abs(count / 20_000 - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 20_000)


def test_the_faces_held_out_are_those_of_all_runs_before() -> None:
    test, train = by_number(4000, 0.1)
    assert (len(test), len(train)) == (400, 3600)
    assert test[:8].tolist() == FACES_HELD_OUT and not set(test) & set(train)


FACES_HELD_OUT = [4, 10, 29, 43, 51, 52, 53, 80]


def test_names_are_the_same_bytes_on_every_system(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 1)
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "e\u0301.png")  # as macOS writes an accent
    assert FolderStore(tmp_path).identity(0) == "a/\u00e9.png".encode()


# -- what a run's data were --


def described(folder: Path, **config: Any) -> Datasets:
    return opened(folder, RGB, **config)


def test_a_run_records_its_data_and_says_when_they_are_others(tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    run.mkdir()
    write_folder(images, 30)
    assert record_or_compare(run, described(images).fingerprint) == ""
    recorded = json.loads((run / FILE_NAME).read_text())
    assert recorded["train_images"] + recorded["test_images"] == 30
    assert record_or_compare(run, described(images).fingerprint) == ""
    # --- one more, which comes to the training part ---
    Image.fromarray(colours(1, seed=9)[0]).save(images / "000a.png")
    more = described(images)
    trained = recorded["train_images"]
    assert len(more.train) == trained + 1
    said = record_or_compare(run, more.fingerprint)
    assert f"training images {trained} -> {trained + 1}" in said and "held-out" not in said
    # --- said once: from here on these are the run's data ---
    assert record_or_compare(run, more.fingerprint) == ""
    # --- another name ---
    (images / "000a.png").rename(images / "000b.png")
    assert "but not the same ones" in record_or_compare(run, described(images).fingerprint)
    # --- another share ---
    said = record_or_compare(run, described(images, test_fraction=0.5).fingerprint)
    assert "training images" in said and "other held-out images" in said


def test_unreadable_images_do_not_count(tmp_path: Path) -> None:
    write_folder(tmp_path, 30)
    whole = described(tmp_path).fingerprint
    (tmp_path / "000.png").write_bytes(b"gone")
    cut = described(tmp_path).fingerprint
    assert whole.train_images + whole.test_images == 1 + cut.train_images + cut.test_images


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b"\xff", b'{"train_images": "x"}'])
def test_a_damaged_record_is_no_error(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path / "images", 5)
    (tmp_path / FILE_NAME).write_bytes(content)
    found = described(tmp_path / "images").fingerprint
    assert record_or_compare(tmp_path, found).startswith("warning: ")
    assert record_or_compare(tmp_path, found) == ""
