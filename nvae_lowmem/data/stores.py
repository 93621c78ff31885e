"""Stores: numbered images that are not decoded yet, in a folder, a ZIP or an array."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from nvae_lowmem.data.decode import MAX_FILE_BYTES, UnreadableImage, decode, image_extensions
from nvae_lowmem.data.labels import LARGEST_TABLE_BYTES, TABLE_NAME, Labels, folder_labels, no_labels, table_labels
from nvae_lowmem.errors import ConfigError, printable


class Store(Protocol):
    """Numbered images. `image` may be called from several threads at once."""

    description: str

    def __len__(self) -> int:
        """How many there are, readable or not."""

    def name(self, index: int) -> str:
        """What messages call this image."""

    def identity(self, index: int) -> bytes:
        """What the image is known by wherever it stands: its path below the source, or what it holds; never `index`.

        It decides whether the image is held out.
        """

    def image(self, index: int) -> Image.Image:
        """The image in mode L or RGB. Raises UnreadableImage, or ConfigError for what must not be skipped."""

    def labels(self) -> Labels:
        """The classes of all images. Raises ConfigError where there are none, or not of every image."""


class ArrayStore:
    """Images that are in memory already: `pixels` is (N, C, H, W) uint8 with 1 or 3 channels."""

    def __init__(self, pixels: np.ndarray, description: str, read_labels: Callable[[], Labels] | None = None) -> None:
        """read_labels: where the set has labels, reads them; called when they are asked for."""
        assert pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
        self.pixels, self.description, self._read_labels = pixels, description, read_labels

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"number {index} of {self.description}"

    def identity(self, index: int) -> bytes:
        return hashlib.sha256(self.pixels[index].tobytes()).digest()

    def image(self, index: int) -> Image.Image:
        values = self.pixels[index]
        return Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))

    def labels(self) -> Labels:
        if self._read_labels is None:
            raise no_labels(self.description)
        return self._read_labels()


class FolderStore:
    """All images below a folder, in the order of their paths. Raises ConfigError where there are none."""

    def __init__(self, folder: Path, white: float = 0.0) -> None:
        self._folder, self._white = folder, white
        files, unreadable = _files_below(folder)
        self._names = [name for name in files if is_image_name(name)]
        if not self._names:
            locked = f"; not readable: {printable(', '.join(unreadable[:3]))}" if unreadable else ""
            raise ConfigError(_no_images(f"folder {str(folder)!r}", files) + locked)
        self.description = f"folder {str(folder)!r} with {len(self._names):,} image files"
        if unreadable:
            self.description += f" (left out, not readable: {printable(', '.join(unreadable[:3]))})"

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return printable(self._folder / self._names[index])

    def identity(self, index: int) -> bytes:
        return _path_identity(self._names[index])

    def image(self, index: int) -> Image.Image:
        path, name = self._folder / self._names[index], self.name(index)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
                raise UnreadableImage(f"{name}: is not a file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnreadableImage(f"{name}: larger than {MAX_FILE_BYTES >> 20} MiB")
            data = path.read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror or error}") from error
        return decode(data, name, self._white)

    def labels(self) -> Labels:
        where, table = f"folder {str(self._folder)!r}", self._folder / TABLE_NAME
        paths = [name.replace(os.sep, "/") for name in self._names]
        if not table.is_file():
            return folder_labels(paths, where)
        try:
            with table.open("rb") as file:
                return table_labels(file.read(LARGEST_TABLE_BYTES + 1), paths, where)
        except OSError as error:
            raise ConfigError(f"{table} cannot be read: {error.strerror or error}") from None


class ZipStore:
    """All images in a ZIP file, in the order of their names. Raises ConfigError where it cannot be used."""

    def __init__(self, path: Path, white: float = 0.0) -> None:
        self._path, self._white = path, white
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"data source {str(path)!r} cannot be read as a ZIP file: {error}; pack it anew"
            ) from error
        members = sorted((m for m in self._zip.infolist() if not m.is_dir()), key=lambda m: m.filename)
        self._members = [m for m in members if is_image_name(m.filename)]
        if not self._members:
            raise ConfigError(_no_images(f"ZIP file {str(path)!r}", (m.filename for m in members)))
        if all(m.flag_bits & 1 for m in self._members):
            raise ConfigError(f"ZIP file {str(path)!r} is encrypted: pack it anew without a password")
        self.description = f"ZIP file {str(path)!r} with {len(self._members):,} image files"

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        return printable(f"{self._path}:{self._members[index].filename}")

    def identity(self, index: int) -> bytes:
        return _path_identity(self._members[index].filename)

    def image(self, index: int) -> Image.Image:
        member, name = self._members[index], self.name(index)
        if member.file_size > MAX_FILE_BYTES:  # the declared size also bounds what zipfile unpacks
            raise UnreadableImage(f"{name}: larger than {MAX_FILE_BYTES >> 20} MiB")
        try:
            data = self._zip.read(member)
        except Exception as error:  # damaged members raise BadZipFile, zlib.error, EOFError, RuntimeError, ...
            raise UnreadableImage(f"{name}: {printable(error)}") from error
        return decode(data, name, self._white)

    def labels(self) -> Labels:
        where, paths = f"ZIP file {str(self._path)!r}", [m.filename for m in self._members]
        if TABLE_NAME not in self._zip.namelist():
            return folder_labels(paths, where)
        try:
            with self._zip.open(TABLE_NAME) as file:  # no more than is accepted, whatever size it claims
                return table_labels(file.read(LARGEST_TABLE_BYTES + 1), paths, where)
        except ConfigError:
            raise
        except Exception as error:  # damaged members raise BadZipFile, zlib.error, EOFError, RuntimeError, ...
            raise ConfigError(f"{TABLE_NAME} in {where} cannot be read: {printable(error)}; pack it anew") from None


def is_image_name(name: str) -> bool:
    """Whether a relative path ends like an image; hidden files and the Mac's own (__MACOSX) are none."""
    path = PurePosixPath(name.replace(os.sep, "/"))
    hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in image_extensions()


def _path_identity(name: str) -> bytes:
    """A relative path as bytes that no system's way to write it changes (macOS takes letters and accents apart)."""
    return unicodedata.normalize("NFC", name.replace(os.sep, "/")).encode("utf-8", "surrogateescape")


def _files_below(folder: Path) -> tuple[list[str], list[str]]:
    """(relative paths of all files, in order; folders that may not be listed). Links are followed, each folder once."""
    files: list[str] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    for where, subfolders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: unreadable.append(str(error.filename))
    ):
        real = os.path.realpath(where)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # sorted: which of two links to one folder counts must not depend on the file system
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [os.path.relpath(os.path.join(where, name), folder) for name in names]
    return sorted(files), unreadable


def _no_images(where: str, names: Iterable[str]) -> str:
    endings = Counter(printable(PurePosixPath(name).suffix.lower()) or "no ending" for name in names)
    found = ", ".join(f"{count:,} files with {ending}" for ending, count in endings.most_common(4)) or "it is empty"
    return f"{where} holds no images ({found}); images are files like .png, .jpg or .webp, in sub-folders too"
