"""From what a user names as data to training and held-out images, and a sentence that says what was found."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.recipes import WHERE_FROM
from nvae_lowmem.config.sections import EMBEDDED_SETS, DataConfig, Profile
from nvae_lowmem.data import cifar, idx, lmdb_store
from nvae_lowmem.data.cache import cache_folder
from nvae_lowmem.data.dataset import Dataset, check_colours, load
from nvae_lowmem.data.digits import Digits, mnist5k
from nvae_lowmem.data.faces import faces
from nvae_lowmem.data.fingerprint import Fingerprint
from nvae_lowmem.data.labels import checked_names, numbered_labels, renumbered
from nvae_lowmem.data.lmdb_store import LmdbStore
from nvae_lowmem.data.preparation import Preparation
from nvae_lowmem.data.split import by_identity, by_number
from nvae_lowmem.data.stores import ArrayStore, FolderStore, Store, ZipStore, is_image_name
from nvae_lowmem.errors import ConfigError, raise_problems, unknown_name
from nvae_lowmem.progress import Log

_FORMS = "a folder of images, a ZIP, an LMDB, MNIST IDX files, CIFAR-10 python batches, or mnist5k or faces"
_MOST_FACE_BYTES = 4 << 30


class Datasets(NamedTuple):
    """Training images, held-out images, what was found, in words, and what tells these data from others.

    classes: the names of the classes, by their numbers, where the model is given labels.
    """

    train: Dataset
    test: Dataset
    description: str
    fingerprint: Fingerprint
    classes: tuple[str, ...] = ()

    def named_in(self, profile: Profile) -> Profile:
        """The profile, which keeps what the classes are called."""
        return replace(profile, data=replace(profile.data, class_names=self.classes)) if self.classes else profile


@dataclass(frozen=True)
class _Found:
    """What a source has: its own two parts, or one whole that is still to be split."""

    whole: Store
    test: Store | None = None
    test_is: str = ""
    """The held-out part in words, where its description does not say it."""


class _Classes(NamedTuple):
    """The names of all classes and the labels of both stores; nothing where the model is given no labels."""

    names: tuple[str, ...] = ()
    whole: np.ndarray | None = None
    test: np.ndarray | None = None


def open_source(config: DataConfig, model: ModelConfig, *, log: Log = print) -> Datasets:
    """Find, check and prepare the images that a profile names; both parts have at least one image.

    Raises ConfigError, one paragraph, for whatever is wrong with the source or does not fit the model.
    """
    raise_problems(config.problems(), "data")
    prepare = Preparation.of(config, model)
    with warnings.catch_warnings():
        # pillow warns at the number of pixels that we refuse with a message
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = _find(config.source, "data.source", config, model, log)
        if config.test_source:
            other = _find(config.test_source, "data.test_source", config, model, log)
            found = _Found(found.whole, other.test or other.whole)
        return _prepared(found, config, prepare, _classes(found, config, model), log)


def open_store(source: str, config: DataConfig, model: ModelConfig, *, log: Log = print) -> Store:
    """All images that a user names, in order and as they are; of a source with two parts those for training.

    Raises ConfigError as `open_source` does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _find(source, "--data", config, model, log).whole


def open_parts(config: DataConfig, model: ModelConfig, *, log: Log = print) -> tuple[Store, Store | None]:
    """The images of `config.source` as they are: (those for training, or all; held-out ones where it has a part).

    Raises ConfigError as `open_source` does.
    """
    raise_problems(config.problems(), "data")
    found = _find(config.source, "data.source", config, model, log)
    return found.whole, found.test


def class_names(config: DataConfig, model: ModelConfig, *, log: Log = print) -> tuple[str, ...]:
    """What the classes of `config.source` are called, by their numbers. Raises ConfigError where it has no labels."""
    return open_parts(config, model, log=log)[0].labels().names


def _classes(found: _Found, config: DataConfig, model: ModelConfig) -> _Classes:
    if not model.classes:
        return _Classes()
    labels = found.whole.labels()
    names = config.class_names or checked_names(labels, model.classes, found.whole.description)
    whole = renumbered(labels, names, found.whole.description)
    if found.test is None:
        return _Classes(names, whole)
    return _Classes(names, whole, renumbered(found.test.labels(), names, found.test.description))


def _prepared(found: _Found, config: DataConfig, prepare: Preparation, classes: _Classes, log: Log) -> Datasets:
    check_colours(found.whole, prepare.channels, "data.source")
    if found.test is None:
        test_store = found.whole
        test, skipped, test_numbers, train_numbers = _held_out(
            found.whole, config.test_fraction, prepare, log, classes.whole
        )
        share = f"a fixed share of {config.test_fraction:.3g}"
    else:
        test_store, test_numbers = found.test, np.arange(len(found.test))
        check_colours(found.test, prepare.channels, "data.test_source" if config.test_source else "data.source")
        test, skipped = load(found.test, test_numbers, prepare, log, classes.test)
        train_numbers, share = np.arange(len(found.whole)), found.test_is or found.test.description
    train_numbers = train_numbers[: config.max_images or None]
    train, train_skipped = load(found.whole, train_numbers, prepare, log, classes.whole)
    skipped = train_skipped + skipped
    _report_skipped(skipped, log)
    _check_not_empty(train, test, found, skipped)
    text = f"{found.whole.description}: {len(train):,} for training; held out: {len(test):,} ({share})"
    if skipped:
        text += f"; {len(skipped):,} unreadable images skipped"
    if classes.names:
        shown = ", ".join(classes.names[:10]) + (", ..." if len(classes.names) > 10 else "")
        text += f"; labels of {len(classes.names):,} classes: {shown}"
    parts = ((found.whole, train_numbers, len(train)), (test_store, test_numbers, len(test)))
    return Datasets(train, test, text, Fingerprint.of(*parts), classes.names)


def _held_out(
    store: Store, fraction: float, prepare: Preparation, log: Log, labels: np.ndarray | None
) -> tuple[Dataset, list[str], np.ndarray, np.ndarray]:
    """(held-out images, what was skipped, their numbers, the numbers of the training images), in order.

    At least one image is held out and at least one is not; when none of the share can be read, it grows until one can.
    """
    ranked, count = by_identity(store, fraction)
    most = len(ranked) - 1
    count = min(max(1, count), most)
    test, skipped = load(store, np.sort(ranked[:count]), prepare, log, labels)
    while not len(test) and count < most:
        tried, count = count, min(2 * count, most)
        test, more = load(store, np.sort(ranked[tried:count]), prepare, log, labels)
        skipped += more
    return test, skipped, np.sort(ranked[:count]), np.sort(ranked[count:])


def _report_skipped(skipped: list[str], log: Log) -> None:
    if skipped:
        more = f" and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
        log(f"warning: {len(skipped):,} images cannot be read and are skipped: {'; '.join(skipped[:5])}{more}")


def _check_not_empty(train: Dataset, test: Dataset, found: _Found, skipped: list[str]) -> None:
    if len(train) and len(test):
        return
    why = f" ({len(skipped):,} cannot be read, for example {skipped[0]})" if skipped else ""
    which = "training" if not len(train) else "held-out"
    store = found.test if found.test is not None and len(train) else found.whole
    hint = "" if found.test else ": at least two readable images are needed, one of them is held out"
    raise ConfigError(f"{store.description}: no {which} image is left{why}{hint}")


def _find(name: str, key: str, config: DataConfig, model: ModelConfig, log: Log) -> _Found:
    """What a name or path stands for. Raises ConfigError naming `key` where it is nothing known."""
    if name == "mnist5k":
        train, test = mnist5k()
        return _Found(_digits(train, "5,000 MNIST digits (mnist5k)"), _digits(test, "its own test part"))
    if name == "faces":
        return _find_faces(config, model, log)
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _find_in_folder(path, config.white)
        if path.exists():
            return _find_in_file(path, key, config.white)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key} {name!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    raise ConfigError(_nothing_there(name, key))


def _digits(part: Digits, description: str) -> ArrayStore:
    return ArrayStore(part.pixels, description, lambda: numbered_labels(part.labels, description))


def _find_faces(config: DataConfig, model: ModelConfig, log: Log) -> _Found:
    """The drawn faces, split by number: what face i looks like follows from i alone."""
    count, size = config.faces_count, model.image_size
    if count * 3 * size * size > _MOST_FACE_BYTES:
        raise ConfigError(
            f"data.faces_count = {count:,} faces of {size} x {size} pixels take {count * 3 * size**2 / (1 << 30):.3g} "
            f"GiB; at most {_MOST_FACE_BYTES >> 30} GiB are drawn: set fewer faces or a smaller model.image_size"
        )
    pixels = faces(count, size, cache_folder(config.cache_dir), log, config.faces_style)
    test, train = by_number(count, config.test_fraction)
    text = f"{count:,} drawn cartoon faces{'' if config.faces_style == 'mixed' else f' ({config.faces_style})'}"
    if count == 1:
        return _Found(ArrayStore(pixels, text))
    share = f"a fixed share of {config.test_fraction:.3g}"
    return _Found(ArrayStore(pixels[train], text), ArrayStore(pixels[test], text), share)


def _nothing_there(name: str, key: str) -> str:
    published = Path(name).name  # of a recipe, whose data a profile names, and which somebody has to fetch
    if published in WHERE_FROM:
        return (
            f"{key} {published!r}: these images do not come with the package, and there is no file or folder of that "
            f"name here. They are {WHERE_FROM[published]}; or name any other of {_FORMS} (docs/data.md says more)"
        )
    if "/" not in name and "\\" not in name and "." not in name:
        unknown = unknown_name("embedded set", name, EMBEDDED_SETS)
        return f"{key} {name!r}: there is no such file or folder here, and it is an {unknown}. Give {_FORMS} (--data)"
    return f"{key} {name!r} does not exist: give {_FORMS} (--data)"


def _find_in_folder(folder: Path, white: float) -> _Found:
    if lmdb_store.is_lmdb(folder):
        return _Found(LmdbStore(folder, white))
    train, test = lmdb_store.find_parts(folder)
    if train:
        return _two_parts(*(LmdbStore(part, white) if part else None for part in (train, test)))
    train, test = idx.find_parts(folder)
    if train or test:
        return _two_parts(idx.read_images(train) if train else None, idx.read_images(test) if test else None)
    batches = cifar.find_batches(folder)
    if batches:
        return _two_parts(*cifar.read_batches(batches))
    return _Found(FolderStore(folder, white))


def _two_parts(train: Store | None, test: Store | None) -> _Found:
    """Both parts, or the only one there is as a whole."""
    if train is None:
        assert test is not None
        return _Found(test)
    return _Found(train, test)


def _find_in_file(path: Path, key: str, white: float) -> _Found:
    if not path.is_file():  # reading a pipe or a device might never end
        raise ConfigError(f"{key} {str(path)!r} is neither a file nor a folder: give {_FORMS}")
    if lmdb_store.is_lmdb(path):
        return _Found(LmdbStore(path, white))
    if idx.is_idx(path):
        return _Found(idx.read_images(path))
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return _Found(ZipStore(path, white))
    if is_image_name(path.name):
        raise ConfigError(f"{key} {str(path)!r} is one image: name the folder that it is in")
    if path.name.endswith((".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".7z", ".rar")):
        raise ConfigError(f"{key} {str(path)!r} is an archive that cannot be read in place: unpack it, name the folder")
    path.open("rb").close()  # a file that may not be read gets the system's reason
    raise ConfigError(f"{key} {str(path)!r} is not a kind of file that holds images: give {_FORMS}")
