"""Files are whole or not there, and refused before the long work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.files import output_file, partial_file, writable_file, writable_folder, write_atomically, write_output


def test_places_that_cannot_be_written_to_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file: cannot be made"):
        writable_folder("--out", tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--json .*: is a folder"):
        writable_file("--json", tmp_path)
    assert writable_file("--json", tmp_path / "a" / "b.json").parent.is_dir()
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.gif", r"--picture .*x.gif: the name must end in .png or .svg"), ("no/x.png", "there is no folder"),
     ("d.png", "it is a folder")],
)  # fmt: skip
def test_an_output_is_refused_before_the_work(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "d.png").mkdir()
    with pytest.raises(ConfigError, match=said):
        output_file("--picture", str(tmp_path / name), (".png", ".svg"))
    assert output_file("--picture", str(tmp_path / "x.PNG"), (".png",)) == tmp_path / "x.PNG"
    assert output_file("--json", "-") is None and output_file("--json", "") is None
    assert [path.name for path in tmp_path.iterdir()] == ["d.png"]


def test_what_fails_half_way_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "f", "old ä")
    with pytest.raises(ZeroDivisionError), partial_file(path) as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    assert path.read_bytes() == "old ä".encode() and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match=r"--out .* cannot be written: No such file or directory"):
        write_output("--out", tmp_path / "nowhere" / "f", b"")


def test_a_link_stays_one_and_a_pipe_is_written_to_itself(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
