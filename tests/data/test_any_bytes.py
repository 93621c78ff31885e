"""Whatever the bytes of a source: images, or one ConfigError; never another exception, never a dead process."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from data_files import GREY, RGB, colours
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.errors import ConfigError


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for i, pixels in enumerate(colours(6)):
            packed.writestr(f"{i}.png", png(pixels))
    return buffer.getvalue()


IDX = struct.pack(">IIII", 0x803, 6, 8, 8) + colours(6)[..., 0].tobytes()
SOURCES = {
    "set.zip": zip_bytes(),
    "train-images-idx3-ubyte": IDX,
    "train-images-idx3-ubyte.gz": gzip.compress(IDX),
    "data_batch_1": pickle.dumps({b"data": np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)}, 2),
}


@st.composite
def damage(draw: Callable[..., Any]) -> Callable[[bytes], bytes]:
    """Bytes changed at some places, the end cut off, something put behind it."""
    places = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
    keep, more = draw(st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.0])), draw(st.binary(max_size=20))

    def damaged(data: bytes) -> bytes:
        out = bytearray(data)
        for place, value in places:
            out[int(place * (len(out) - 1))] = value
        return bytes(out[: int(keep * len(out))] + more)

    return damaged


def images_or_a_message(source: Path, grey: bool) -> None:
    try:
        data = open_source(DataConfig(source=str(source)), GREY if grey else RGB, log=lambda _: None)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        for part in (data.train, data.test):
            assert part.images(range(len(part))).shape[1:] == ((1 if grey else 3), 8, 8)


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=60, deadline=None)
@given(change=damage())
def test_any_bytes_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, change: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("source")
    (folder / name).write_bytes(change(SOURCES[name]))
    source = folder if name == "data_batch_1" else folder / name
    images_or_a_message(source, grey="idx" in name)


def tree_pages(data: bytes) -> list[int]:
    """The numbers of an LMDB's pages that hold no values but lead to them."""
    flags = (struct.unpack_from("<H", data, page * 4096 + 10)[0] for page in range(len(data) // 4096))
    return [page for page, flag in enumerate(flags) if flag in (1, 2, 8)]


@settings(max_examples=25, deadline=None)
@given(page=st.floats(0, 1), changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=6))
def test_any_bytes_of_an_lmdb(
    tmp_path_factory: pytest.TempPathFactory, page: float, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("lmdb")
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
        for i, image in enumerate(colours(40, 64)):
            writer.put(str(i).encode(), image.tobytes())
    data = bytearray((folder / "data.mdb").read_bytes())
    pages = tree_pages(data)
    start = pages[int(page * (len(pages) - 1))] * 4096
    for place, value in changes:
        data[start + place] = value
    (folder / "data.mdb").write_bytes(data)
    images_or_a_message(folder, grey=False)


def test_an_lmdb_that_ends_whoever_reads_it_is_refused(tmp_path: Path) -> None:
    """The values are said to go on far behind the end of the file: who reads there is killed by the system."""
    with lmdb.open(str(tmp_path), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
        for i, image in enumerate(colours(4, 64)):
            writer.put(str(i).encode(), image.tobytes())
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    (leaf,) = [p for p in tree_pages(data) if struct.unpack_from("<H", data, p * 4096 + 10)[0] == 2][-1:]
    for node in struct.unpack_from("<4H", data, leaf * 4096 + 16):
        struct.pack_into("<H", data, leaf * 4096 + node + 2, 0x40)  # the upper half of a value's size
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(ConfigError, match="a process that went through it died"):
        open_source(DataConfig(source=str(tmp_path)), RGB, log=lambda _: None)
