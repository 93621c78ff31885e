"""Many images as single files: a folder of PNGs, or one ZIP of them. Legend: b images of a chunk, S pixels per side."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from nvae_lowmem.files import partial_file
from nvae_lowmem.generation import grids


def write_pngs(chunks: Iterable[Tensor], folder: Path) -> Path:
    """Images (b, C, S, S) in [0, 1] as folder/00000.png ...; those of an earlier, longer series go."""
    folder.mkdir(exist_ok=True)
    written = set()
    for name, content in _png_files(chunks):
        (folder / name).write_bytes(content)
        written.add(name)
    for old in folder.iterdir():
        if re.fullmatch(r"\d{5,}\.png", old.name) and old.name not in written:
            old.unlink()
    return folder


def write_zip(chunks: Iterable[Tensor], path: Path) -> Path:
    """Images (b, C, S, S) in [0, 1] as 00000.png ... in one archive, which appears when it is whole."""
    with partial_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:  # stored: PNG is compressed already
        for name, content in _png_files(chunks):
            archive.writestr(name, content)
    return path


def _png_files(chunks: Iterable[Tensor]) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of every image, in its own size."""
    cells = (cell for chunk in chunks for cell in grids.to_uint8(chunk))
    for number, cell in enumerate(cells):
        yield f"{number:05d}.png", grids.png_bytes(cell)
