"""`launch/blend.py` and what it writes: strips, matrices, animations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_folder
from generation_runs import DEEP, GREY, RGB, demo_run, picture_file, responsive, write_run
from PIL import Image

from launch.blend import main
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.image_files import load_images
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.blend import (
    animation_weights,
    blend_images,
    path_weights,
    save_animation,
    strip_picture,
    weight_texts,
)

# --- pictures ---------------------------------------------------------------------------------------------------------


def test_strip_shows_the_images_above_their_blends() -> None:
    images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0, 1, 5)[:, None].expand(5, 3)
    picture = strip_picture(images[:2], images[2:], ["a", "b"], weights)
    blends = grids.grid(images[2:], 5, under=["0", "0.25", "0.5", "0.75", "1"])
    assert np.array_equal(picture[-blends.shape[0] :], blends)


def test_what_stands_below_a_blend_says_how_much_of_the_second_image_is_in_it() -> None:
    points = torch.tensor([[0.25, 0.25, 0.25], [0, 1, 1], [0, 0.5, 1], [1, 1, 1]])
    assert weight_texts(points) == ["0.25", "B: 2", "~0.5", "1"]


@pytest.mark.parametrize(("ending", "kind"), [(".gif", "GIF"), (".webp", "WEBP"), (".PNG", "PNG")])
def test_animation_goes_there_and_back_for_ever(tmp_path: Path, ending: str, kind: str) -> None:
    images = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 1, 60, 60)
    with Image.open(save_animation(images, tmp_path / f"a{ending}", 0.1)) as moving:
        assert moving.format == kind and moving.n_frames == 6 and moving.info["loop"] == 0  # type: ignore[attr-defined]
        greys = []
        for frame in range(6):
            moving.seek(frame)
            assert moving.size == (60, 60)
            greys.append(np.asarray(moving.convert("L"))[5, 5].item())
    np.testing.assert_allclose(greys, [0, 85, 170, 255, 170, 85], atol=2)


def test_animation_is_refused_before_the_long_work(tmp_path: Path) -> None:
    assert animation_weights(DEEP, "linear", "1", 1, "") is None
    weights = animation_weights(DEEP, "linear", "1", 5, str(tmp_path / "a.gif"))
    assert weights is not None and weights.shape == (5, 7)
    (tmp_path / "a.gif").touch()
    assert animation_weights(DEEP, "linear", "1", 5, str(tmp_path / "new" / "a.gif")) is not None
    assert (tmp_path / "new").is_dir()
    for frames, name, message in ((5, "a.mp4", "must end in"), (1, "a.gif", "at least 2"), (5, "a.gif/b.gif", "made")):
        with pytest.raises(ConfigError, match=message):
            animation_weights(DEEP, "linear", "1", frames, str(tmp_path / name))


# --- launch/blend.py --------------------------------------------------------------------------------------------------


def test_command_writes_strip_matrix_and_animation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", responsive(RGB), source=str(tmp_path / "gone"))
    paths = [picture_file(tmp_path / f"{name}.png", seed) for seed, name in enumerate("ab")]
    animation = tmp_path / "morph.gif"
    arguments = [*paths, "--run", str(run), "--device", "cpu", "--steps", "3", "--matrix", "2", "--frames", "3"]
    assert main([*arguments, "--animation", str(animation), "--seed", "4"]) == 0
    written = [run / "samples" / "blend-linear-a-b.png", run / "samples" / "blend-linear-a-b-matrix.png", animation]
    assert capsys.readouterr().out.splitlines()[1:] == [str(path) for path in written]
    pair = load_images(paths, Profile(model=RGB))
    images = blend_images(responsive(RGB), pair, path_weights(RGB, "linear", "1", "", 3), seed=4, micro_batch=4)
    strip, expected = np.asarray(Image.open(written[0])), grids.grid(images, 16, under=["0", "0.5", "1"])
    shown = strip[-expected.shape[0] :, : expected.shape[1]].astype(int)
    assert np.abs(shown - expected).max() <= 1
    corners = grids.grid(images[[0, 0, 2, 2]], 2)  # of which the first and the last are the ends of the strip, too
    under = grids.UNDER_PIXELS
    matrix = np.asarray(Image.open(written[1]))[-corners.shape[0] - 2 * under :, : corners.shape[1]]
    assert np.array_equal(matrix[:58, :58], corners[:58, :58])
    assert np.array_equal(matrix[-58 - under : -2 - under, -58:], corners[-58:-2, -58:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "gone.png"], "image gone.png: cannot be read: No such file"),
        (["A", "TEXT"], "is not an image that can be read"),
        (["A", "A", "--run", "nobody"], "--run nobody: no run folder"),
        (["A", "A", "--weights", "2"], "--weights 2: every weight must be from 0"),
        (["A", "A", "--weights", "0,1,0,1"], "4 weights; give 1 for all, 2 for the scales or 3 for the groups"),
        (["A", "A", "--steps", "0"], "--steps 0: must be at least 1"),
        (["A", "A", "--matrix", "1"], "--matrix 1: must be at least 2"),
        (["A", "A", "--mode", "scales", "--matrix", "3"], "--matrix needs weights"),
        (["A", "A", "--mode", "scales", "--weights", "0.5"], "--mode scales takes whole groups"),
        (["A", "A", "--mode", "scales", "--split", "group:4"], "--split group:4: must be scale:N"),
        (["A", "A", "--animation", "a.mp4"], "--animation a.mp4: must end in one of .gif, .webp, .png"),
        (["A", "A", "--box", "0,0,99,99"], "--box 0,0,99,99 reaches beyond image"),
        (["A", "A", "--micro-batch", "-2"], "--micro-batch -2: must be at least 0"),
        (["A", "A", "--scale", "65"], "--scale 65: must be from 1 to 64"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "runs" / "00000-t", responsive(GREY), source=str(tmp_path / "gone"))
    files = {"A": picture_file(tmp_path / "a.png", 0), "TEXT": str(tmp_path / "note.png")}
    Path(files["TEXT"]).write_text("no image")
    assert main(["--runs-dir", str(tmp_path / "runs"), *(files.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("blend.py: ") and error.count("\n") == 1


def test_scale_says_how_large_images_are_in_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    sides: dict[int, list[int]] = {}
    for scale in (1, 10):
        common = ["--run", str(run), "--scale", str(scale), "--out", str(tmp_path / str(scale))]
        assert main(["--steps", "3", "--matrix", "2", "--animation", "morph.gif", "--frames", "2", *common]) == 0
        strip, matrix = sorted((tmp_path / str(scale)).iterdir(), key=lambda path: "matrix" in path.name)
        sides[scale] = [Image.open(path).height for path in (strip, matrix, tmp_path / "morph.gif")]
    assert sides[1][2] == 16 and sides[10][2] == 160
    assert sides[10][0] - sides[1][0] == sides[10][1] - sides[1][1] == 2 * 9 * 16  # two rows of 16 x 16 images each


def test_two_images_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a.png"]) == 2
    assert "two images are blended, not 1: name two, or none" in capsys.readouterr().err


def test_data_that_hold_out_one_image_are_told_from_a_mistake_in_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "pictures", 2)
    assert main(["--run", str(demo_run(tmp_path, with_data=False))]) == 2
    assert "hold out one image alone: name two files to blend" in capsys.readouterr().err


def test_a_split_without_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a.png", "b.png", "--split", "scale:1"]) == 2
    assert "--split scale:1 belongs to --mode scales and to --matrix" in capsys.readouterr().err


def test_help_says_in_which_order_weights_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "HIGHEST RESOLUTION" in " ".join(capsys.readouterr().out.replace("│", " ").split())
