"""export, encode and decode as a person types them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import write_folder
from generation_runs import DIGITS, RGB, responsive, write_run
from PIL import Image

import nvae_lowmem as nl
from nvae_lowmem.commands import decode, encode, export, import_nvlabs


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_run(tmp_path / "runs" / "00000-faces", responsive(RGB), source="elsewhere"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_folder(tmp_path / "pictures", count=7)
    return tmp_path / "pictures"


def test_an_export_can_be_zipped_and_loaded(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["out", "--run", run, "--temperatures", "0.8", "--passes", "1", "--zip"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["out", "out.zip"]
    assert torch.equal(nl.load("out.zip").sample(1, passes=1), nl.load("out").sample(1, passes=1))
    assert export.main(["out", "--run", run]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_a_published_checkpoint_of_a_run_gives_the_same_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(tmp_path / "run", responsive(DIGITS)))
    assert export.main([str(tmp_path / "out"), "--run", run, "--to", "published"]) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    assert capsys.readouterr().out.splitlines()[-1] == str(path) and list(path.parent.iterdir()) == [path]
    assert import_nvlabs.main([str(path), "--out", str(tmp_path / "back")]) == 0
    first, back = nl.load(run), nl.load(str(tmp_path / "back"))
    back.micro_batch = first.micro_batch  # which BatchNorm statistics depend on
    assert torch.equal(first.sample(4, passes=2), back.sample(4, passes=2))
    assert export.main([str(tmp_path / "out"), "--run", run, "--to", "published"]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_what_a_published_checkpoint_has_no_place_for_is_one_message(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["out", "--run", run, "--to", "published"]
    assert export.main([*arguments, "--zip"]) == 2
    assert "--zip belongs to --to folder" in capsys.readouterr().err
    assert export.main([*arguments, "--temperatures", "0.7"]) == 2
    assert "--temperatures belongs to --to folder" in capsys.readouterr().err
    other = str(write_run(tmp_path / "grey", responsive(replace(RGB, image_channels=1)), source="elsewhere"))
    assert export.main(["out", "--run", other, "--to", "published"]) == 2
    message = capsys.readouterr().err
    assert "cannot hold model.image_channels = 1" in message and message.count("\n") == 1
    assert not Path("out").exists()


def test_latents_go_to_files_and_come_back_as_pictures(run: str, pictures: Path) -> None:
    assert encode.main([str(pictures), "latents", "--run", run, "--images-per-file", "3"]) == 0
    assert len(list(Path("latents").glob("*.safetensors"))) == 3
    assert decode.main(["latents", "drawn", "--run", run]) == 0
    names = sorted(path.stem for path in pictures.rglob("*") if path.is_file())
    drawn = sorted(Path("drawn").rglob("*.png"))
    assert [path.stem for path in drawn] == names
    expected = nl.load(run).reconstruct(
        [Image.open(p) for p in sorted(pictures.rglob("*")) if p.is_file()], posterior="mean"
    )
    assert len(drawn) == len(expected) == 7


def test_an_interrupted_encoding_goes_on(run: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(pictures), "latents", "--run", run, "--images-per-file", "3", "--posterior", "sample"]
    assert encode.main(arguments) == 0
    whole = {path.name: path.read_bytes() for path in Path("latents").iterdir()}
    Path("latents/latents-000001.safetensors").write_bytes(b"cut off")
    Path("latents/latents-000002.safetensors").unlink()
    capsys.readouterr()
    assert encode.main(arguments) == 0
    assert "4 images encoded now" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("latents").iterdir()} == whole
    assert encode.main([*arguments, "--seed", "5"]) == 2
    assert "seed differ" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_said_and_left_out(
    run: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = sorted(path for path in pictures.rglob("*") if path.is_file())[2]
    broken.write_bytes(b"no image")
    assert encode.main([str(pictures), "latents", "--run", run]) == 0
    printed = capsys.readouterr().out
    assert broken.name in printed and "6 images encoded now" in printed


def test_latents_that_lead_out_of_the_folder_are_not_written(run: str, tmp_path: Path) -> None:
    latents = nl.load(run).encode(torch.zeros(1, 3, 16, 16))
    latents.save("evil.safetensors", ["../../evil"])
    assert decode.main(["evil.safetensors", "drawn/deep", "--run", run]) == 2
    assert not list(tmp_path.rglob("evil.png"))


def test_what_is_no_file_of_latents_is_refused(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["nothing", "drawn", "--run", run]) == 2
    assert "no such file of latents" in capsys.readouterr().err
    Path("text.safetensors").write_text("no tensors")
    assert decode.main(["text.safetensors", "drawn", "--run", run]) == 2
    assert "cannot be read" in capsys.readouterr().err
