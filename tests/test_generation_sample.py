"""Sampling: images do not depend on chunks, recalibration moves decoder statistics only, grids, `launch/sample.py`."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from launch.sample import main
from nvae_lowmem.config import ConfigError, DataConfig, MemoryPlan, ModelConfig, Profile
from nvae_lowmem.generation import grids
from nvae_lowmem.generation import recalibrate as recalibration
from nvae_lowmem.generation.recalibrate import load_statistics, recalibrate, recalibrate_once, recalibrated
from nvae_lowmem.generation.sample import (
    group_temperatures,
    parse_temperature,
    reconstruct_images,
    sample_images,
    temperature_text,
    without_padding,
)
from nvae_lowmem.model.latents import FromPrior, SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.checkpoint import export_weights

SMALL: dict[str, Any] = {
    "channels_encoder": 4, "channels_decoder": 4, "scales": 2, "groups_per_scale": (2, 1), "latents": 2,
    "cells_encoder": 1, "cells_decoder": 1, "preprocess_blocks": 1, "preprocess_cells": 1, "postprocess_blocks": 1,
    "postprocess_cells": 1,
}  # fmt: skip
GREY = ModelConfig(image_channels=1, image_size=12, padding=2, bits=1, **SMALL)
RGB = ModelConfig(image_channels=3, image_size=16, bits=5, mixtures=2, flows=1, **SMALL)
DIGITS = ModelConfig(image_channels=1, image_size=28, padding=2, bits=1, **SMALL)


def build(config: ModelConfig, seed: int = 0) -> NVAE:
    """A model whose BatchNorms have all been somewhere, in evaluation mode."""
    torch.manual_seed(seed)
    model = NVAE(config)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(std=0.1)
            elif name.endswith("running_variance"):
                value.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.head") and "log_norm" in name:
                parameter.add_(2)  # pictures with contrast: near 1/2 everywhere a difference would hide
    return model.eval()


def snapshot(model: NVAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: NVAE, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("likelihood_sample", [False, True], ids=["mean", "sample"])
def test_images_have_the_datas_size_and_range(config: ModelConfig, likelihood_sample: bool) -> None:
    images = sample_images(build(config), 3, 1.0, 0, 2, likelihood_sample)
    assert images.shape == (3, config.image_channels, config.image_size, config.image_size)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    on_grid = images * (2**config.bits - 1)
    assert torch.allclose(on_grid, on_grid.round(), atol=1e-4) == likelihood_sample


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(-(2**63), 2**64 - 1))
def test_images_do_not_depend_on_chunks_or_count(micro_batch: int, count: int, seed: int) -> None:
    model = build(RGB)
    whole, chunked = sample_images(model, 7, 0.8, seed, 7), sample_images(model, count, 0.8, seed, micro_batch)
    assert whole.std(0).max() > 1e-3  # the images differ from one another
    torch.testing.assert_close(chunked, whole[:count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
def test_drawn_pixels_do_not_depend_on_chunks(config: ModelConfig) -> None:
    model = build(config)
    whole, chunked = (sample_images(model, 5, 1.0, 3, micro_batch, True) for micro_batch in (5, 2))
    # a parameter's last bit may put a pixel on the other side of a rounding edge, which hardly ever happens
    assert (whole != chunked).float().mean() < 1e-3
    assert (whole[0] != whole[1]).float().mean() > 0.1


def test_seed_and_temperature_decide_the_image() -> None:
    model = build(GREY)
    assert torch.equal(sample_images(model, 2, 0.7, 1, 2), sample_images(model, 2, 0.7, 1, 2))
    assert not torch.allclose(sample_images(model, 2, 0.7, 1, 2), sample_images(model, 2, 0.7, 2, 2), atol=1e-4)
    frozen = sample_images(model, 2, 0.0, 1, 2)
    torch.testing.assert_close(frozen[0], frozen[1], rtol=0, atol=1e-6)  # every latent at its mean


def test_temperatures_per_scale_reach_their_groups() -> None:
    assert group_temperatures(0.7, GREY) == (0.7, 0.7, 0.7)
    assert group_temperatures((0.9, 0.0), GREY) == (0.0, 0.9, 0.9)  # highest resolution first -> groups from the top
    source = FromPrior(SeededNoise(0), group_temperatures((0.9, 0.0), GREY))
    _, latents = build(GREY).top_down(source, batch=2, keep_z=True)
    drawn = [latent.z for latent in latents if latent.z is not None]
    assert [z.shape[-1] for z in drawn] == [4, 8, 8]
    assert [bool(z.abs().max() > 0) for z in drawn] == [False, True, True]  # the top group's prior has mean 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=4))
def test_temperature_survives_its_text(values: list[float]) -> None:
    temperature = tuple(values) if len(values) > 1 else values[0]
    assert parse_temperature(temperature_text(temperature)) == temperature


@pytest.mark.parametrize("text", ["", "warm", "-0.1", "nan", "inf", "0.7,", "0.7;0.8", "0.7,-1"])
def test_bad_temperature_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--temperature .*: must be a number from 0 up"):
        parse_temperature(text)


def test_temperatures_of_another_number_of_scales_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 temperatures for a model of 2 scales"):
        sample_images(build(GREY), 1, (0.7, 0.8, 0.9), 0, 1)


def test_reconstructions_do_not_depend_on_chunks() -> None:
    model, images = build(RGB), torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, chunked = (reconstruct_images(model, images, 0, micro_batch) for micro_batch in (5, 2))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    assert not torch.allclose(whole, reconstruct_images(model, images.flip(0), 0, 5), atol=1e-4)  # they see the images


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    sample_images(build(GREY), 5, 0.7, 0, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


# --- recalibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
def test_recalibration_moves_the_decoders_statistics_and_nothing_else(config: ModelConfig) -> None:
    model = build(config)
    before, modes = snapshot(model), [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    recalibrate(model, 0.7, 2, 2, 0)
    decoder = tuple(f"blocks.{name}" for name in ("dec_", "post_"))
    expected = {n for n in before if n.startswith(decoder) and n.endswith(("running_mean", "running_variance"))}
    assert expected and changed(model, before) == expected
    assert [(m.training, getattr(m, "momentum", None)) for m in model.modules()] == modes


def test_recalibrated_statistics_are_the_mean_over_passes() -> None:
    model, passes, images = build(GREY), 3, 4
    total: dict[str, Tensor] = {}
    for i in range(passes):  # the statistics of each batch alone: momentum 1 keeps nothing of the batch before
        alone = build(GREY).train()
        for layer in alone.layers():
            layer.momentum = 1.0
        noise = SeededNoise(5, recalibration.NOISE_STEP, first_slot=i * images)
        with torch.no_grad():
            alone.top_down(FromPrior(noise, 0.8), batch=images)
        total = {k: total.get(k, 0) + v for k, v in alone.state_dict().items() if "running" in k}
    recalibrate(model, 0.8, passes, images, 5)
    own = model.state_dict()
    for name, value in total.items():
        torch.testing.assert_close(own[name], value / passes)


def test_statistics_before_are_forgotten_and_the_temperature_is_felt() -> None:
    cold, cold_again, warm = build(GREY), build(GREY), build(GREY)
    for layer in cold_again.layers():
        if layer.gamma is not None:
            layer.running_mean.fill_(7)
    recalibrate(cold, 0.2, 2, 4, 0)
    recalibrate(cold_again, 0.2, 2, 4, 0)
    recalibrate(warm, 1.0, 2, 4, 0)
    before = snapshot(cold)
    decoder = {name for name in before if name.startswith("blocks.dec_0_1.cells") and "running" in name}
    assert decoder and decoder.isdisjoint(changed(cold_again, before)) and decoder <= changed(warm, before)


def test_one_image_per_pass_at_one_pixel_gives_finite_statistics() -> None:
    tiny = ModelConfig(image_channels=1, image_size=8, bits=1, **SMALL | {"scales": 3, "groups_per_scale": (1, 1, 2)})
    model = build(tiny)
    assert tiny.scale_sizes[-1] == 1
    recalibrate(model, 0.7, 2, 1, 0)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_recalibrated_gives_the_statistics_back_whatever_happens() -> None:
    model = build(GREY)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"), recalibrated(model, 0.7, 2, 2, 0):
        assert changed(model, before)
        raise RuntimeError("on purpose")
    assert not changed(model, before)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recalibrated(model, 0.7, 2, 2, 0, stop):
        pass
    assert not changed(model, before) and not any(m.training for m in model.modules())


def test_statistics_are_estimated_once_per_checkpoint_temperature_and_settings(tmp_path: Path) -> None:
    def passes_run(temperature: float, passes: int, model: NVAE) -> int:
        ran: list[int] = []
        recalibrate_once(model, tmp_path, temperature, passes, 2, 0, lambda done, total: ran.append(done))
        return len(ran)

    first, second = build(GREY), build(GREY)
    assert passes_run(0.7, 3, first) == 3
    assert passes_run(0.7, 3, second) == 0
    assert not changed(second, snapshot(first))
    assert passes_run(0.8, 3, second) == 3
    assert passes_run(0.7, 2, second) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bn-t0.70.safetensors", "bn-t0.80.safetensors"]
    (tmp_path / "bn-t0.80.safetensors").write_bytes(b"broken")
    assert passes_run(0.8, 3, second) == 3
    assert passes_run(0.8, 3, second) == 0
    with pytest.raises(ConfigError, match="another model"):
        load_statistics(build(replace(GREY, channels_decoder=8)), tmp_path / "bn-t0.80.safetensors")


@pytest.mark.parametrize(
    ("device", "micro_batch", "passes"), [("cuda", 1, 300), ("cuda", 32, 300), ("cpu", 1, 320), ("cpu", 100, 20)]
)
def test_default_passes_are_hundreds_on_a_gpu_and_hundreds_of_images_on_a_cpu(
    device: str, micro_batch: int, passes: int
) -> None:
    assert recalibration.default_passes(torch.device(device), micro_batch) == passes


def test_fewer_than_one_pass_is_refused() -> None:
    with pytest.raises(ConfigError, match="--passes 0"):
        recalibrate(build(GREY), 0.7, 0, 2, 0)


# --- pictures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 7), columns=st.integers(1, 5), side=st.integers(3, 70), channels=st.sampled_from([1, 3]),
    padding=st.integers(0, 3),
)  # fmt: skip
def test_grid_shows_every_image_in_its_place(count: int, columns: int, side: int, channels: int, padding: int) -> None:
    images = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    picture = grids.grid(images, columns, padding)
    wide = min(columns, count)
    step = (picture.shape[1] - padding) // wide
    cell = step - padding
    assert cell >= grids.MIN_CELL_PIXELS or cell == side
    assert cell % side == 0 and picture.shape[0] == -(-count // wide) * step + padding
    for i, image in enumerate(grids.to_uint8(images)):
        top, left = padding + i // wide * step, padding + i % wide * step
        shown = picture[top : top + cell, left : left + cell]
        factor = cell // side
        assert np.array_equal(shown[factor // 2 :: factor, factor // 2 :: factor], image)
    if padding:
        assert (picture[:padding] == 255).all() and (picture[:, :padding] == 255).all()


def test_pixels_are_rounded_and_other_channels_are_shown_grey() -> None:
    two_channels = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert grids.to_uint8(two_channels).tolist() == [[[[128, 128, 128]]]]
    assert grids.to_uint8(torch.tensor([-0.1, 0.6 / 255, 1.2]).view(1, 3, 1, 1)).tolist() == [[[[0, 1, 255]]]]


def test_label_stands_above_the_whole_picture() -> None:
    picture = np.full((20, 30, 3), 90, np.uint8)
    out = grids.labelled(picture, "temperature 0.7")
    height = out.shape[0] - 20
    assert np.array_equal(out[height:, :30], picture)
    assert (out[:height] < 100).any() and (out[:height, -grids.CAPTION_MARGIN_PIXELS :] == 255).all()  # not cut off


def test_saved_picture_replaces_the_old_one_whole(tmp_path: Path) -> None:
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    for content in (255 - picture, picture):
        path = grids.save_png(content, tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_training_pictures_are_drawn_and_leave_the_model_alone(tmp_path: Path) -> None:
    model = build(GREY)
    before, draw = snapshot(model), grids.training_pictures(Profile(model=GREY, plan=MemoryPlan(micro_batch=4)))
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    pictures = draw(model, images, tmp_path, 7)
    names = ["0.7", "0.8", "0.9", "1.0"]
    assert set(pictures) == {"reconstructed", *(f"generated_{t}" for t in names)}
    assert not changed(model, before)
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert set(written) == {"reals.png", "reconstructions-7.png", *(f"step-7-t{t}.png" for t in names)}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "step-7-t0.7.png")), pictures["generated_0.7"])
    reals = np.asarray(Image.open(tmp_path / "reals.png"))
    assert np.array_equal(reals, grids.grid(without_padding(images, GREY), 16))
    assert np.array_equal(reals, pictures["reconstructed"][: len(reals)])  # originals above reconstructions
    draw(model, images.flip(0), tmp_path, 8)
    assert (tmp_path / "reals.png").stat().st_mtime_ns == written["reals.png"]


# --- launch/sample.py -------------------------------------------------------------------------------------------------


def run_of(model: ModelConfig, folder: Path, source: str = "mnist5k") -> Path:
    profile = Profile(name="t", model=model, data=DataConfig(source=source), plan=MemoryPlan(micro_batch=4))
    export_weights(folder, profile, build(model).state_dict())
    return folder


def test_default_command_draws_grids_and_an_overview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(DIGITS, tmp_path / "runs" / "00003-t")
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
    run = run_of(RGB, tmp_path / "run", source=str(tmp_path / "gone"))
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
    run = run_of(GREY, tmp_path / "run", source=str(tmp_path / "gone"))
    arguments = ["--run", str(run), "--count", "2", "--no-recalibrate", "--temperature", "0.7"]
    heights = []
    for reals in (None, np.full((40, 50, 3), 200, np.uint8)):
        if reals is not None:
            grids.save_png(reals, run / "samples" / "reals.png")
        assert main(arguments) == 0
        heights.append(Image.open(run / "samples" / "overview.png").height)
    assert "no reconstructions" in capsys.readouterr().err
    assert heights[1] - heights[0] == 40 + grids.CAPTION_PIXELS + 2 * grids.CAPTION_MARGIN_PIXELS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nobody"], "--run nobody: no run folder"),
        (["--runs-dir", "nowhere"], "--run latest: there is no run in nowhere"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--passes", "-1"], "--passes -1: must be at least 0"),
        (["--micro-batch", "-4"], "--micro-batch -4: must be at least 0"),
        (["--temperature", "-0.5"], "--temperature -0.5: must be a number from 0 up"),
        (["--temperature", "hot"], "--temperature hot: must be a number from 0 up"),
        (["--temperatures", "0.7", "0.7,0.8,0.9"], "3 temperatures for a model of 2 scales"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run_of(GREY, tmp_path / "runs" / "00000-t")
    assert main(["--runs-dir", str(tmp_path / "runs"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out


def test_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(GREY, tmp_path / "run")
    (weights,) = run.rglob("model.safetensors")
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert main(["--run", str(run)]) == 2
    assert f"{weights} cannot be read" in capsys.readouterr().err
    weights.write_bytes(b"short")
    assert main(["--run", str(run)]) == 2
    assert "a file is truncated" in capsys.readouterr().err


def test_output_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(GREY, tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main(["--run", str(run), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "--out" in capsys.readouterr().err


def test_help_says_in_which_order_scales_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "HIGHEST RESOLUTION" in capsys.readouterr().out
