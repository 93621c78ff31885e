"""A run and its data: paths from any folder, data that have moved, data that are others than before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import run, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.data.fingerprint import FILE_NAME
from nvae_lowmem.training.open_run import held_out_batches, open_run


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (count, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def test_a_run_goes_on_from_any_folder_however_its_data_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = write_profile(tmp_path)
    write_images(tmp_path / "img", 20)
    arguments = (profile, "--run-dir", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--data", "./img", "--steps", "2").code == 0
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert profiles.load(tmp_path / "run" / "config.toml").data.source == str(tmp_path / "img")
    for name in ("../img", str(tmp_path / "img"), f"file://{tmp_path}/img"):
        result = run(*arguments, "--data", name, "--steps", "2")
        assert result.code == 0, result.complained
        assert "warning: the data" not in result.said


def test_a_run_says_when_its_data_are_others(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    write_images(tmp_path / "img", 20)
    arguments = (profile, "--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "img"))
    assert "warning" not in run(*arguments, "--steps", "2").said
    before = json.loads((tmp_path / "run" / FILE_NAME).read_text())
    Image.new("L", (16, 16), 9).save(tmp_path / "img" / "more.png")
    said = run(*arguments, "--steps", "3").said
    assert (
        "warning: the data are not those that the run began with (" in said and f" {before['train_images']} -> " in said
    )


def test_images_that_have_moved_are_found_with_data(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    write_images(tmp_path / "img", 20)
    assert run(profile, "--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "img"), "--steps", "1").code == 0
    before = [x.numpy() for x in held_out_batches(open_run(str(tmp_path / "run"), "", "cpu"), 0)]
    shutil.move(tmp_path / "img", tmp_path / "moved")
    with pytest.raises(Exception, match=r"img' does not exist.*--data"):
        held_out_batches(open_run(str(tmp_path / "run"), "", "cpu"), 0)
    moved = open_run(str(tmp_path / "run"), "", "cpu", data=str(tmp_path / "moved"))
    for old, new in zip(before, held_out_batches(moved, 0), strict=True):
        np.testing.assert_array_equal(old, new.numpy())


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX systems only")
def test_a_folder_whose_name_is_no_utf_8_is_trained_on_and_found_again(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    name = os.fsdecode(os.fsencode(tmp_path) + b"/pics\xff\xf0\x9f\x98\x80")
    write_images(Path(name), 20)
    result = run(profile, "--run-dir", str(tmp_path / "run"), "--set", f"data.source={name}", "--steps", "1")
    assert result.code == 0, result.complained
    assert r"pics\udcff" in result.said or r"pics\xff" in result.said
    opened = open_run(str(tmp_path / "run"), "", "cpu")
    assert opened.profile.data.source == name and list(held_out_batches(opened, 1))


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX systems only")
def test_a_run_folder_whose_name_is_no_utf_8_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    profile, name = write_profile(tmp_path), os.fsdecode(os.fsencode(tmp_path) + b"/run\xff")
    for flag in ("--run-dir", "--runs-dir"):
        result = run(profile, flag, name)
        assert result.code == 2 and r"run\xff: the name is no UTF-8" in result.complained and not os.path.exists(name)
