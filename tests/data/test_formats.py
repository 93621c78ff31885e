"""IDX files, CIFAR-10 batches and LMDBs: what they give, and how damaged and hostile ones are answered."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.errors import ConfigError

RNG = np.random.default_rng(3)
DIGITS = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
CIFAR_PIXELS = RNG.integers(0, 256, (12, 3072), dtype=np.uint8)
GREY = ModelConfig(image_channels=1, image_size=28)
RGB32 = ModelConfig(image_channels=3, image_size=32)


def opened(source: Path, model: ModelConfig, **config: Any) -> Datasets:
    return open_source(DataConfig(source=str(source), **config), model, log=lambda _: None)


def message(source: Path, model: ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(source, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def idx_bytes(images: np.ndarray, magic: int = 0x803) -> bytes:
    return struct.pack(">IIII", magic, *images.shape) + images.tobytes()


# -- MNIST's IDX files --


def test_idx_folder_has_its_own_test_part_plain_or_gzipped(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(DIGITS[:20])))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(DIGITS[20:]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 20) + bytes(20))
    data = opened(tmp_path, GREY)
    np.testing.assert_array_equal(data.train.images(range(20)), DIGITS[:20, None])
    np.testing.assert_array_equal(data.test.images(range(10)), DIGITS[20:, None])


def test_one_idx_file_under_any_name_is_split(tmp_path: Path) -> None:
    (tmp_path / "mine.bin").write_bytes(idx_bytes(DIGITS))
    data = opened(tmp_path / "mine.bin", GREY, test_fraction=0.1)
    assert len(data.train) + len(data.test) == 30 and len(data.test) < 10


def test_idx_images_are_resized_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.full((4, 28, 20), 77, np.uint8)))
    data = opened(tmp_path, ModelConfig(image_channels=1, image_size=16), test_source=str(tmp_path))
    np.testing.assert_array_equal(data.train.images([0, 1]), np.full((2, 1, 16, 16), 77))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (idx_bytes(DIGITS, magic=0x999), "not an IDX file of images"),
        (b"", "begins with nothing"),
        (b"\x00\x00\x08\x03\x00", "not an IDX file of images"),
        (struct.pack(">II", 0x801, 3) + bytes(12), "holds labels"),
        (idx_bytes(DIGITS)[:-1], "ends after"),
        (idx_bytes(DIGITS) + b"x", "goes on after"),
        (struct.pack(">IIII", 0x803, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), "GiB are accepted"),
        (struct.pack(">IIII", 0x803, 0, 28, 28), "GiB are accepted"),
        (gzip.compress(idx_bytes(DIGITS))[:-500], "cannot be read"),
        (b"\x1f\x8b" + bytes(50), "cannot be read"),
    ],
)
def test_wrong_idx_files_say_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    text = message(path, GREY)
    assert said in text and str(path) in text


# -- CIFAR-10's python batches --


def write_cifar(folder: Path, protocol: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, part in enumerate(np.split(CIFAR_PIXELS[:10], 5), start=1):
        batch = {b"data": part, b"labels": [0, 1], b"batch_label": b"x", b"filenames": [b"a.png", b"b.png"]}
        (folder / f"data_batch_{n}").write_bytes(pickle.dumps(batch, protocol=protocol))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": CIFAR_PIXELS[10:]}, protocol=protocol))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar_batches_give_both_parts(tmp_path: Path, protocol: int, below: str) -> None:
    write_cifar(tmp_path / below, protocol)
    data = opened(tmp_path, RGB32)
    np.testing.assert_array_equal(data.train.images(range(10)), CIFAR_PIXELS[:10].reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(data.test.images(range(2)), CIFAR_PIXELS[10:].reshape(-1, 3, 32, 32))


def test_cifar_batches_as_python_2_wrote_them_are_read(tmp_path: Path) -> None:
    """The published files name numpy.core.multiarray and hold Python 2 byte strings."""
    pixels = CIFAR_PIXELS[:3]
    text = b"\x80\x02}U\x04data" + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    text += b"(K\x01K\x03M\x00\x0c\x86" + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    text += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    text += b"\x89T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes() + b"tbs."
    (tmp_path / "data_batch_1").write_bytes(text)
    data = opened(tmp_path, RGB32, test_source=str(tmp_path))
    np.testing.assert_array_equal(data.train.images(range(3)), pixels.reshape(-1, 3, 32, 32))


class _Runs:
    """A pickle of this calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._call


_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
HOSTILE = {
    "posix.system": lambda where: _Runs(os.system, f"touch {where}"),
    "builtins.exec": lambda where: _Runs(exec, f"open({str(where)!r}, 'w')"),
    "builtins.getattr": lambda where: _Runs(getattr, np.ndarray, "tofile"),
    "os.mkdir": lambda where: _Runs(os.mkdir, str(where)),
    "array construction": lambda where: _Runs(_RECONSTRUCT, np.ndarray, (1 << 40,), b"b"),
    "_codecs.encode": lambda where: _Runs(codecs.encode, "x", "rot13"),
}


def nested(opcode: bytes, depth: int) -> bytes:
    """{b"data": 0, (((...))): 0}"""
    return b"\x80\x04}(C\x04dataK\x00" + b")" + opcode * depth + b"K\x00u."


def ndarray_called(images: int) -> bytes:
    """{b"data": numpy.ndarray((images, 3072))}: memory that nobody has written to."""
    return b"\x80\x02}U\x04datacnumpy\nndarray\nJ" + struct.pack("<i", images) + b"M\x00\x0c\x86\x85Rs."


BOMBS = {
    "nested tuples as a key": nested(b"\x85", 2_000_000),
    "nested frozen sets as a key": b"\x80\x04}(" + b"(" * 500_000 + b")" + b"\x91" * 500_000 + b"K\x00u.",
    "nested tuples by marks": b"\x80\x02}(" + b"(" * 500_000 + b")" + b"t" * 500_000 + b"K\x00u.",
    "nested tuples by memo": b"\x80\x02}()" + b"q\x00h\x00\x86" * 300_000 + b"K\x00u.",
    "42 bytes for a million images": ndarray_called(10**6),
    "9 GB": ndarray_called(3 * 10**6),
    "a text made bytes many times": b"\x80\x02](c_codecs\nencode\nq\x00X" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
    + b"q\x01X\x06\x00\x00\x00latin1q\x02\x86q\x03R" + b"h\x00h\x03R" * 100_000 + b"e.",
    "an array without bytes": pickle.dumps({b"data": np.zeros((0, 3072), np.uint8)}, protocol=2),
    "an odd dtype": pickle.dumps({b"data": np.zeros(1, np.dtype([("a", "V9")]))}, protocol=2),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_a_batch_is_refused(tmp_path: Path, name: str) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(BOMBS[name])
    text = message(tmp_path, RGB32)
    assert "data_batch_2" in text and "download" in text and len(text) < 500


@pytest.mark.parametrize("named", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path, named: str) -> None:
    write_cifar(tmp_path)
    trace = tmp_path / "it-ran"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": HOSTILE[named](trace)}, protocol=2))
    text = message(tmp_path, RGB32)
    assert "data_batch_3" in text and "was not run" in text and named.split(".")[-1] in text
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": [1, 2, 3]}),
        pickle.dumps({b"data": np.zeros((4, 3072), np.float32)}),
        pickle.dumps({b"data": np.zeros((4, 100), np.uint8)}),
        pickle.dumps({b"data": CIFAR_PIXELS})[:-100],
    ],
)
def test_damaged_cifar_batches_are_named(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    assert "test_batch" in message(tmp_path, RGB32)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_cifar_batch_with_any_one_byte_changed_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(folder)
    content = bytearray((folder / "data_batch_1").read_bytes())
    content[place] = byte
    (folder / "data_batch_1").write_bytes(content)
    try:
        data = opened(folder, RGB32)
    except ConfigError as error:
        assert "data_batch_1" in str(error)
    else:
        assert data.train.images([0]).shape == (1, 3, 32, 32)


# -- LMDBs --


def write_lmdb(path: Path, values: list[bytes], first_key: int = 0, subdir: bool = True) -> None:
    with lmdb.open(str(path), map_size=1 << 24, subdir=subdir) as environment, environment.begin(write=True) as writer:
        for i, value in enumerate(values, start=first_key):
            writer.put(str(i).encode(), value)


def raw(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("subdir", [True, False])
def test_lmdb_of_raw_images_is_read_as_a_folder_or_as_one_file(tmp_path: Path, subdir: bool) -> None:
    pixels = raw(12, 64)
    write_lmdb(tmp_path / "set.lmdb", [image.tobytes() for image in pixels], subdir=subdir)
    data = opened(tmp_path / "set.lmdb", ModelConfig(image_channels=3, image_size=64), test_fraction=0.25)
    assert len(data.train) + len(data.test) == 12
    seen = np.concatenate([part.images(range(len(part))).numpy() for part in (data.train, data.test)])
    assert {image.tobytes() for image in seen} == {image.transpose(2, 0, 1).tobytes() for image in pixels}


def test_lmdb_pair_as_the_published_code_lays_it_out_and_larger_images_are_resized(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "train.lmdb", [image.tobytes() for image in raw(4, 96)])
    write_lmdb(tmp_path / "validation.lmdb", [image.tobytes() for image in raw(2, 96)])
    data = opened(tmp_path, ModelConfig(image_channels=3, image_size=64))
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.train.images([0, 3]).shape == (2, 3, 64, 64)


def test_one_lmdb_can_be_opened_twice(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "a", [image.tobytes() for image in raw(4, 64)])
    model = ModelConfig(image_channels=3, image_size=64)
    data = [opened(tmp_path / "a", model, test_source=str(tmp_path / "a")) for _ in range(2)]
    np.testing.assert_array_equal(data[0].test.images(range(4)), data[1].train.images(range(4)))


def jpegs(count: int, size: tuple[int, int] = (178, 218)) -> list[bytes]:
    """As the published script for CelebA puts them into an LMDB: the files."""
    out = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", size, (20 * i, 255 - 20 * i, 7)).save(buffer, "JPEG", quality=95)
        out.append(buffer.getvalue())
    return out


def test_lmdb_of_image_files_is_read_and_damaged_ones_are_skipped(tmp_path: Path) -> None:
    values = jpegs(6)
    values[0], values[4] = values[0][:300], b""
    write_lmdb(tmp_path / "train.lmdb", values)
    write_lmdb(tmp_path / "validation.lmdb", jpegs(2))
    data = opened(tmp_path, ModelConfig(image_channels=3, image_size=64))
    assert (len(data.train), len(data.test)) == (4, 2)
    assert "image files" in data.description and "2 unreadable" in data.description
    found = data.test.images([1])[0].float().mean((1, 2)).numpy()
    np.testing.assert_allclose(found, (20, 235, 7), atol=4)


def test_raw_images_that_begin_like_a_file_are_raw_images(tmp_path: Path) -> None:
    pixels = raw(3, 64)
    for start in (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", bytes(18)):
        values = [start + image.tobytes()[len(start) :] for image in pixels]
        path = tmp_path / start.hex()
        write_lmdb(path, values)
        data = opened(path, ModelConfig(image_channels=3, image_size=64), test_source=str(path))
        assert data.train.images([2]).numpy().transpose(0, 2, 3, 1).tobytes() == values[2]


def test_lmdb_with_gaps_skips_them(tmp_path: Path) -> None:
    values = [image.tobytes() for image in raw(6, 64)]
    values[2] = values[2][:-1]
    write_lmdb(tmp_path / "a", values)
    data = opened(tmp_path / "a", ModelConfig(image_channels=3, image_size=64))
    assert "1 unreadable" in data.description and len(data.train) + len(data.test) == 5


@pytest.mark.parametrize(("values", "first_key", "said"), [([b"12345"], 0, "5 bytes"), ([bytes(12288)], 7, "key '0'")])
def test_lmdb_of_something_else_says_what_is_expected(
    tmp_path: Path, values: list[bytes], first_key: int, said: str
) -> None:
    write_lmdb(tmp_path / "a", values, first_key)
    assert said in message(tmp_path / "a", ModelConfig(image_channels=3, image_size=64))


@pytest.mark.parametrize("keep_bytes", [0, 100, 8192, 20480])
def test_a_cut_off_lmdb_is_refused_not_mapped(tmp_path: Path, keep_bytes: int) -> None:
    write_lmdb(tmp_path / "a", [image.tobytes() for image in raw(6, 64)])
    file = tmp_path / "a" / "data.mdb"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    text = message(tmp_path / "a", ModelConfig(image_channels=3, image_size=64))
    assert "LMDB" in text and str(tmp_path / "a") in text
