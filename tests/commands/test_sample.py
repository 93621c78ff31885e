"""`launch/sample.py`: grids, overview, archives and files of samples; bad input is one message."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from generation_runs import DIGITS, GREY, RGB, seasoned, write_run
from PIL import Image

from launch.sample import main
from nvae_lowmem.generation import grids


def test_default_command_draws_grids_and_an_overview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "00003-t", seasoned(DIGITS))
    arguments = ["--runs-dir", str(tmp_path / "runs"), "--count", "5", "--passes", "2", "--device", "cpu"]
    assert main(arguments) == 0
    names = [f"generated-t{t}.png" for t in ("0.7", "0.8", "0.9", "1.0")]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [*names, "overview.png"]
    out = capsys.readouterr().out
    assert all(str(run / "samples" / name) in out for name in [*names, "overview.png"])
    heights = [Image.open(run / "samples" / name).height for name in names]
    caption = grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS
    # held-out images and reconstructions, one row of cells each, then the four grids; each with its caption
    overview = Image.open(run / "samples" / "overview.png")
    assert overview.height == 6 * caption + 2 * heights[0] + sum(heights)
    assert main([*arguments, "--temperature", "0.7", "--format", "zip"]) == 0
    assert "kept in" in capsys.readouterr().out  # the statistics are not estimated again


@pytest.mark.parametrize("likelihood", ["mean", "sample"])
def test_zip_and_png_hold_every_image_in_its_own_size(tmp_path: Path, likelihood: str) -> None:
    run = write_run(tmp_path / "run", seasoned(RGB), source=str(tmp_path / "gone"))
    arguments = ["--run", str(run), "--out", str(tmp_path / "out"), "--no-recalibrate", "--likelihood", likelihood]
    arguments += ["--temperatures", "0.7,0.95", "1"]
    assert main([*arguments, "--count", "3", "--format", "zip"]) == 0
    assert main([*arguments, "--count", "5", "--format", "png"]) == 0
    assert main([*arguments, "--count", "3", "--format", "png", "--micro-batch", "2"]) == 0
    names = ["00000.png", "00001.png", "00002.png"]
    for stem in ("generated-t0.7-0.95", "generated-t1.0"):
        folder = tmp_path / "out" / stem
        assert sorted(p.name for p in folder.iterdir()) == names  # the longer series before is gone
        with zipfile.ZipFile(tmp_path / "out" / f"{stem}.zip") as archive:
            assert archive.namelist() == names
            for name in names:
                zipped, single = (np.asarray(Image.open(f)) for f in (io.BytesIO(archive.read(name)), folder / name))
                assert zipped.shape == (16, 16, 3)
                assert np.abs(zipped.astype(int) - single).max() <= (1 if likelihood == "mean" else 255 // 31 + 1)
    assert not (run / "samples").exists() and not list(run.rglob("bn-*"))


def test_without_the_data_the_overview_has_what_training_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", seasoned(GREY), source=str(tmp_path / "gone"))
    arguments = ["--run", str(run), "--count", "2", "--no-recalibrate", "--temperature", "0.7"]
    heights = []
    for reals in (None, np.full((40, 50, 3), 200, np.uint8)):
        if reals is not None:
            grids.save_png(reals, run / "samples" / "reals.png")
        assert main(arguments) == 0
        heights.append(Image.open(run / "samples" / "overview.png").height)
    assert "no reconstructions" in capsys.readouterr().err
    assert heights[1] - heights[0] == 40 + grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS


def test_scale_says_how_large_images_are_in_grids(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seasoned(RGB), source=str(tmp_path / "gone"))
    sizes = []
    for scale in ("0", "1", "10"):
        arguments = ["--run", str(run), "--out", str(tmp_path / "out"), "--no-recalibrate", "--temperature", "1"]
        assert main([*arguments, "--count", "2", "--scale", scale]) == 0
        sizes.append(Image.open(tmp_path / "out" / "generated-t1.0.png").size)
    gaps = 2 * 3, 2 * 2  # around two images in a row
    assert sizes == [(2 * side + gaps[0], side + gaps[1]) for side in (64, 16, 160)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nobody"], "--run nobody: no run folder"),
        (["--runs-dir", "nowhere"], "--run latest: there is no run in nowhere"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--passes", "-1"], "--passes -1: must be at least 0"),
        (["--micro-batch", "-4"], "--micro-batch -4: must be at least 0"),
        (["--temperature", "-0.5"], "--temperature -0.5: must be a number from 0 up"),
        (["--scale", "-1"], "--scale -1: must be from 1 to 64"),
        (["--temperature", "hot"], "--temperature hot: must be a number from 0 up"),
        (["--temperatures", "0.7", "0.7,0.8,0.9"], "3 temperatures for a model of 2 scales"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "runs" / "00000-t", seasoned(GREY))
    assert main(["--runs-dir", str(tmp_path / "runs"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out


def test_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", seasoned(GREY))
    (weights,) = run.rglob("model.safetensors")
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert main(["--run", str(run)]) == 2
    assert f"{weights.parent}: model.safetensors is damaged" in capsys.readouterr().err
    weights.write_bytes(b"short")
    assert main(["--run", str(run)]) == 2
    assert str(weights.parent) in capsys.readouterr().err


def test_output_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", seasoned(GREY))
    (tmp_path / "file").write_text("")
    assert main(["--run", str(run), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "--out" in capsys.readouterr().err


def test_help_says_in_which_order_scales_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "HIGHEST RESOLUTION" in capsys.readouterr().out


def test_classes_are_drawn_by_name_with_rows_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", seasoned(replace(GREY, classes=3)), source=str(tmp_path / "gone"))
    arguments = ["--run", str(run), "--out", str(tmp_path / "out"), "--no-recalibrate", "--temperature", "0.7"]
    assert main([*arguments, "--class", "all", "--count", "7", "--guidance", "1.5"]) == 0
    assert main([*arguments, "--class", "1", "--count", "3"]) == 0
    assert main([*arguments, "--class", "2", "none", "--count", "3", "--format", "zip"]) == 0
    rows, one = (Image.open(tmp_path / "out" / f"generated-t0.7-class-{n}.png") for n in ("all-g1.5", "1"))
    caption = grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS
    assert rows.height == 3 * (caption + one.height)  # 7 images of 3 classes: 3 of each
    with zipfile.ZipFile(tmp_path / "out" / "generated-t0.7-class-2-none.zip") as archive:
        assert len(archive.namelist()) == 4
    capsys.readouterr()
    for wrong in (["--class", "seven"], ["--guidance", "-1"]):
        assert main([*arguments, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_classes_of_a_model_without_labels_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", seasoned(GREY), source=str(tmp_path / "gone"))
    for wrong in (["--class", "1"], ["--guidance", "1.5"]):
        assert main(["--run", str(run), *wrong]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "trained without class labels" in error
