"""Images in and out: files become what the data were, reconstructions and their ELBO, `launch/reconstruct.py`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from generation_runs import DIGITS, GREY, RGB, images_for, picture_file, untrained, write_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launch.reconstruct import main
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.data.image_files import load_images, parse_box
from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.reconstruct import RowNoise, error_table, parse_first_groups, picture_of, reconstruct
from nvae_lowmem.model.latents import FirstGroups, FromPosterior, FromPrior, NoNoise
from nvae_lowmem.text_table import text_table
from nvae_lowmem.training.open_run import held_out_batches, open_run

MICRO_BATCH = 2


# --- the pass ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_noise_belongs_to_the_image_whichever_row_it_is_in(slots: list[int]) -> None:
    one_by_one = [RowNoise(7, (slot,)).normal(1, (1, 2, 3, 3), torch.device("cpu")) for slot in range(4)]
    rows = RowNoise(7, tuple(slots)).normal(1, (len(slots), 2, 3, 3), torch.device("cpu"))
    assert all(torch.equal(row, one_by_one[slot][0]) for row, slot in zip(rows, slots, strict=True))
    assert not torch.equal(one_by_one[0], one_by_one[1])


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
def test_reconstructions_have_the_elbo_of_the_model_whatever_the_chunks(config: ModelConfig) -> None:
    model, images = untrained(config), images_for(config, 5)
    result = reconstruct(model, images, seed=3, micro_batch=2)
    with torch.no_grad():
        terms = model.elbo_terms(images, FromPosterior(RowNoise(3, (0, 1, 2, 3, 4))))
    torch.testing.assert_close(result.nll, terms.nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.kl, torch.stack([kl.sum(1) for kl in terms.kl], 1), rtol=1e-4, atol=1e-4)
    assert (
        torch.equal(result.originals, without_padding(images, config)) and result.images.shape == result.originals.shape
    )
    whole = reconstruct(model, images, seed=3, micro_batch=5, first_groups=(1,))
    parts = reconstruct(model, images, seed=3, micro_batch=2, first_groups=(1,))
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.from_first[1], parts.from_first[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_first_groups_are_the_images_and_the_later_ones_the_priors(count: int) -> None:
    model, images = untrained(GREY), images_for(GREY, 2)
    with torch.no_grad():
        maps = model.encode(images)
        _, own = model.top_down(FromPosterior(NoNoise()), [*maps], return_z=True)
        source = FirstGroups(count, FromPosterior(NoNoise()), FromPrior(NoNoise()))
        _, mixed = model.top_down(source, maps, return_z=True)
    for group, (z, expected) in enumerate(zip(mixed, own, strict=True)):
        assert z.z is not None and expected.z is not None
        assert torch.equal(z.z, expected.z) == (group < count)
        assert (z.kl is None) == (group >= count)


def test_all_groups_are_the_reconstruction_and_a_colder_prior_is_nearer_its_mean() -> None:
    model, images = untrained(RGB), images_for(RGB, 3)
    result = reconstruct(model, images, 0, 2, first_groups=(1, 3), temperature=1.0)
    assert torch.equal(result.from_first[3], result.images)
    still, cool, warm = (
        reconstruct(model, images, 0, 2, "mean", (1,), temperature).from_first[1] for temperature in (0.0, 0.3, 1.0)
    )
    assert 0 < (cool - still).norm() < (warm - still).norm()


@given(st.integers(1, 40), st.booleans())
def test_automatic_first_groups_fit_every_model(groups: int, two_scales: bool) -> None:
    per_scale = (groups, 1) if two_scales else (groups,)
    config = replace(GREY, groups_per_scale=per_scale, scales=len(per_scale))
    counts = parse_first_groups("auto", config)
    assert all(1 <= count < config.total_groups for count in counts) and list(counts) == sorted(set(counts))
    assert parse_first_groups(",".join(map(str, counts)) or "none", config) == counts


def test_table_has_the_errors_and_the_elbo_in_the_literatures_unit() -> None:
    for config, unit, scale in ((GREY, "nats", 1.0), (RGB, "bits/dim", 1 / (3 * 16 * 16 * math.log(2)))):
        result = reconstruct(untrained(config), images_for(config, 2), 0, 2, first_groups=(1,))
        head, first, _, mean = error_table(result, ["a.png", "b.png"], config.bits).splitlines()
        assert head.split()[0] == "image" and f"-ELBO {unit}" in head and "MSE from 1" in head
        name, mse, l1, nll, kl, elbo, mse_first = first.split()
        difference = (result.images - result.originals).numpy()
        assert name == "a.png" and mean.split()[0] == "mean"
        assert float(mse) == pytest.approx(np.mean(difference[0] ** 2), abs=1e-5)
        assert float(l1) == pytest.approx(np.mean(np.abs(difference[0])), abs=1e-5)
        assert float(elbo) == pytest.approx(float(result.nll[0] + result.kl[0].sum()) * scale, abs=6e-3)
        assert float(nll) == pytest.approx(float(result.nll[0]), abs=0.06)
        assert float(kl) == pytest.approx(float(result.kl[0].sum()), abs=0.06)
        assert float(mse_first) != float(mse)
        assert float(mean.split()[1]) == pytest.approx(np.mean(difference**2), abs=1e-5)


def test_posterior_means_have_errors_but_no_bound() -> None:
    model, images = untrained(GREY), images_for(GREY, 2)
    drawn, mean = (reconstruct(model, images, 0, 2, posterior) for posterior in ("sample", "mean"))
    assert not torch.equal(drawn.images, mean.images)
    assert torch.equal(mean.images, reconstruct(model, images, 9, 2, "mean").images)  # no seed in it
    assert "ELBO" in error_table(drawn, ["a", "b"], 1) and "ELBO" not in error_table(mean, ["a", "b"], 1)


def test_picture_has_a_labelled_row_of_each_kind() -> None:
    result = reconstruct(untrained(GREY), images_for(GREY, 3), 0, 3, first_groups=(1, 2))
    picture = picture_of(result, 3, 0.3)
    caption, row = grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS, grids.grid(result.originals, 3)
    assert picture.shape[0] == 4 * (caption + row.shape[0])
    for i, images in enumerate([result.originals, result.images, result.from_first[1], result.from_first[2]]):
        top = i * (caption + row.shape[0]) + caption
        assert np.array_equal(picture[top : top + row.shape[0], : row.shape[1]], grids.grid(images, 3))


def test_table_columns_are_aligned() -> None:
    assert text_table("<>", [["a", "long"], ["xyz", "1"], ["", "22222"]], rule=False) == [
        "a     long",
        "xyz      1",
        "     22222",
    ]


# --- images in --------------------------------------------------------------------------------------------------------


def test_file_is_squared_resized_quantised_and_padded_as_the_data(tmp_path: Path) -> None:
    path = picture_file(tmp_path / "a.png")
    image = load_images([path], Profile(model=RGB))
    square = Image.open(path).crop((8, 0, 32, 24)).resize((16, 16), Image.Resampling.LANCZOS)
    expected = np.asarray(square).transpose(2, 0, 1) // 8 / 31
    np.testing.assert_allclose(image[0].numpy(), expected, atol=1e-6)
    cropped = load_images([path], Profile(model=RGB, data=DataConfig(crop_pixels=16)))
    expected = np.asarray(Image.open(path))[4:20, 12:28].transpose(2, 0, 1) // 8 / 31
    np.testing.assert_allclose(cropped[0].numpy(), expected, atol=1e-6)
    binary = load_images([path], Profile(model=GREY))
    assert binary.shape == (1, 1, 16, 16) and set(binary.unique().tolist()) == {0.0, 1.0}
    assert not binary[:, :, :2].any() and not binary[:, :, :, -2:].any() and binary[:, :, 2:-2, 2:-2].any()


def test_box_takes_the_square_that_was_asked_for(tmp_path: Path) -> None:
    paths = [picture_file(tmp_path / f"{seed}.png", seed=seed) for seed in (0, 1)]
    config = DataConfig(crop="none")  # a box makes an image square whatever the data's own crop is
    profile = Profile(model=replace(RGB, bits=8), data=config)
    first, second = (np.asarray(Image.open(path)).transpose(2, 0, 1) / np.float32(255) for path in paths)
    same = load_images(paths, profile, ["3,2,16,16"])
    np.testing.assert_allclose(same.numpy(), np.stack([first, second])[:, :, 2:18, 3:19], atol=1e-6)
    each = load_images(paths, profile, ["3,2,16,16", "24,8,16,16"])
    np.testing.assert_allclose(each[1].numpy(), second[:, 8:24, 24:40], atol=1e-6)
    with pytest.raises(ConfigError, match="--box 25,8,16,16 reaches beyond image .*0.png, which is 40 x 24 pixels"):
        load_images(paths, profile, ["25,8,16,16"])
    with pytest.raises(ConfigError, match="--box is given 3 times for 2 images"):
        load_images(paths, profile, ["1,1,2,2"] * 3)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4", "-1,0,4,4", "0,0,0,0", "a,b,c,c", "1.5,0,4,4"])
def test_bad_box_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--box .*: must be x,y,w,h in pixels"):
        parse_box(text)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_held_out_images_are_as_many_as_asked_for(tmp_path: Path, count: int) -> None:
    run = open_run(str(write_run(tmp_path / "run", untrained(DIGITS), micro_batch=MICRO_BATCH)), "runs", "cpu")
    seen: list[tuple[int, int]] = []
    images = torch.cat(list(held_out_batches(run, count, lambda done, total: seen.append((done, total)))))
    assert images.shape == (count, 1, 32, 32) and seen[-1] == (count, count)
    assert set(images.unique().tolist()) == {0.0, 1.0}


# --- launch/reconstruct.py --------------------------------------------------------------------------------------------


def test_command_reconstructs_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = str(tmp_path / "gone")  # files need no data
    run = write_run(tmp_path / "run", untrained(RGB), gone, MICRO_BATCH)
    paths = [picture_file(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)]
    assert main([*paths, "--run", str(run), "--first-groups", "1,2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{seed}.png " in out for seed in range(3)) and "MSE from 2" in out
    images = load_images(paths, Profile(model=RGB))
    result = reconstruct(untrained(RGB), images, 0, 2, first_groups=(1, 2))
    assert np.array_equal(np.asarray(Image.open(run / "samples" / "reconstructions.png")), picture_of(result, 3, 0.3))


def test_command_reconstructs_held_out_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "00000-t", untrained(DIGITS), micro_batch=MICRO_BATCH)
    arguments = [
        "--runs-dir",
        str(run.parent),
        "--out",
        str(tmp_path / "out"),
        "--count",
        "3",
        "--first-groups",
        "none",
    ]
    assert main(arguments) == 0
    assert "held-out 2 " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reconstructions.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nobody"], "--run nobody: no run folder"),
        (["gone.png"], "image gone.png: cannot be read: No such file"),
        (["."], "image .: cannot be read: Is a directory"),
        (["TEXT"], "is not an image that can be read; give a PNG, JPEG or WebP file"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--box", "0,0,4,4"], "--box belongs to image files, and none is given"),
        (["--first-groups", "0"], "--first-groups 0: every number must be from 1 to 3"),
        (["--first-groups", "1,4"], "--first-groups 1,4: every number must be from 1 to 3"),
        (["--first-groups", "few"], "--first-groups few: must be numbers with commas"),
        (["--temperature", "-1"], "--temperature -1.0: must be a number from 0 up"),
        (["--temperature", "nan"], "--temperature nan: must be a number from 0 up"),
        (["--micro-batch", "-1"], "--micro-batch -1: must be at least 0"),
        (["--out", "TEXT"], "cannot be made"),
        ([], "gone"),  # the data of the run
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "runs" / "00000-t", untrained(RGB), str(tmp_path / "gone"), MICRO_BATCH)
    text = tmp_path / "note.png"
    text.write_text("no image")
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert main(["--runs-dir", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("reconstruct.py: ") and error.count("\n") == 1


@pytest.mark.parametrize("damage", ["missing", "version"])
def test_run_without_a_usable_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = write_run(tmp_path / "run", untrained(RGB), micro_batch=MICRO_BATCH)
    state = run / "checkpoints" / "step-00000000" / "state.json"
    if damage == "missing":
        state.unlink()
    else:
        state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
    assert main(["--run", str(run)]) == 2
    assert "checkpoint" in capsys.readouterr().err
