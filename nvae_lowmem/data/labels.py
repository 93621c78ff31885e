"""Class labels of images: from the names of sub-folders, from a StyleGAN dataset.json, or from a set's own files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.model import MOST_CLASSES
from nvae_lowmem.errors import ConfigError, command_line, printable

TABLE_NAME = "dataset.json"
LARGEST_TABLE_BYTES = 128 << 20
"""That of the 1.3 million images of ImageNet has about 60 MiB."""


class Labels(NamedTuple):
    """The class of every image of a store."""

    numbers: np.ndarray
    """(N,) int64: places in `names`."""
    names: tuple[str, ...]


def numbered_labels(values: Sequence[int] | np.ndarray, where: str, names: Sequence[str] = ()) -> Labels:
    """Labels that a set keeps as numbers from 0 up; without names a class is called by its number."""
    numbers = np.asarray(values, dtype=np.int64)
    classes = max(len(names), int(numbers.max(initial=-1)) + 1)
    if numbers.min(initial=0) < 0 or classes > MOST_CLASSES:
        raise ConfigError(f"{where}: labels must be whole numbers from 0 to {MOST_CLASSES - 1:,}")
    called = [*names, *map(str, range(len(names), classes))]
    return Labels(numbers, tuple(map(printable, called)))


def folder_labels(paths: Sequence[str], where: str) -> Labels:
    """The name of the first folder of each relative path; folders that all images share do not count.

    paths: with / between their parts. Classes are in the order of their names. Raises ConfigError for an image that
    lies beside the folders, and for too many folders.
    """
    parts = [PurePosixPath(path).parts for path in paths]
    shared = _shared_folders(parts)
    bare = [path for path, p in zip(paths, parts, strict=True) if len(p) < shared + 2]
    if bare:
        raise ConfigError(
            f"{where}: {_some(bare)} no label: labels are the names of sub-folders, one for each class, with every "
            f"image in one of them (or a {TABLE_NAME} says them); for a model without labels set model.classes = 0"
        )
    own = [p[shared] for p in parts]
    names = sorted(set(own))
    if len(names) > MOST_CLASSES:
        raise ConfigError(f"{where}: {len(names):,} sub-folders, each a class; at most {MOST_CLASSES:,} are accepted")
    place = {name: number for number, name in enumerate(names)}
    return Labels(np.array([place[name] for name in own], dtype=np.int64), tuple(map(printable, names)))


def table_labels(table: bytes, paths: Sequence[str], where: str) -> Labels:
    """What a dataset.json says of the images at these paths: {"labels": [["00000/img00000000.png", 3], ...]}.

    Raises ConfigError where it is something else, and for an image that it does not name.
    """
    entries = _entries(table, where)
    missing = [path for path in paths if path not in entries]
    if missing:
        raise ConfigError(f"{where}: {_some(missing)} no label in {TABLE_NAME}: add it there, or take the image away")
    return numbered_labels([entries[path] for path in paths], f"{TABLE_NAME} in {where}")


def label_rows(numbers: np.ndarray | Sequence[int], classes: int) -> Tensor:
    """What a model is given of labels: numbers (B,) -> (B, classes + 1) float32, one 1 in each row.

    The last column stands for "no class", and so does the number -1.
    """
    rows = np.zeros((len(numbers), classes + 1), dtype=np.float32)
    rows[np.arange(len(numbers)), numbers] = 1
    return torch.from_numpy(rows)


def renumbered(labels: Labels, names: Sequence[str], where: str) -> np.ndarray:
    """(N,) int64: the labels as places in other names. Raises ConfigError for a class that is not among them."""
    place = {name: number for number, name in enumerate(names)}
    unknown = [name for name in labels.names if name not in place]
    if unknown:
        raise ConfigError(
            f"{where}: class {_quoted(unknown)} is none of the model's {len(names)} classes ({_quoted(names)}): give "
            "the folders the same names, or train a new model"
        )
    return np.array([place[name] for name in labels.names], dtype=np.int64)[labels.numbers]


def checked_names(found: Labels, classes: int, where: str) -> tuple[str, ...]:
    """The names of the data's classes. Raises ConfigError where the model is for another number of them."""
    if len(found.names) != classes:
        raise ConfigError(
            f"model.classes = {classes}, but {where} has {len(found.names)} classes ({_quoted(found.names)}): set "
            f"model.classes = {len(found.names)}, or let {command_line('train')} --labels do it"
        )
    return found.names


def no_labels(where: str) -> ConfigError:
    """What to say of data that have none."""
    return ConfigError(
        f"{where} has no labels: give a folder or ZIP with a sub-folder for each class or a StyleGAN {TABLE_NAME}, "
        "MNIST's IDX files with their labels, CIFAR-10's batches, or mnist5k; or set model.classes = 0"
    )


def _entries(table: bytes, where: str) -> dict[str, int]:
    """Path -> number."""
    if len(table) > LARGEST_TABLE_BYTES:
        raise ConfigError(f"{TABLE_NAME} in {where} has more than {LARGEST_TABLE_BYTES >> 20} MiB: it is no such table")
    try:
        content = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{TABLE_NAME} in {where} is no JSON: {printable(error)}") from None
    rows = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(
            f'{TABLE_NAME} in {where} holds no labels: {{"labels": [["00000/a.png", 3], ...]}} is expected, with a '
            "whole number for every image"
        )
    bad = next((row for row in rows if not _is_entry(row)), None)
    if bad is not None:
        raise ConfigError(
            f'{TABLE_NAME} in {where}: {printable(repr(bad)[:80])} is no label: ["00000/a.png", 3] is expected, with a '
            f"whole number from 0 to {MOST_CLASSES - 1:,}"
        )
    return {str(path).replace("\\", "/"): number for path, number in rows}


def _is_entry(row: Any) -> bool:
    if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
        return False
    return type(row[1]) is int and 0 <= row[1] < MOST_CLASSES


def _shared_folders(parts: Iterable[tuple[str, ...]]) -> int:
    """How many folders all these paths begin with alike."""
    shared: tuple[str, ...] | None = None
    for path in parts:
        folders = path[:-1]
        if shared is None:
            shared = folders
        while shared and folders[: len(shared)] != shared:
            shared = shared[:-1]
    return len(shared or ())


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 1:,} more images have" if len(paths) > 1 else " has"
    return printable(paths[0]) + more


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:5])
    return f"{shown}, ..." if len(names) > 5 else shown
