"""Blends: exact at their ends, merged from the top down in between; strips, matrices, animations, `launch/blend.py`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from launch.blend import main
from nvae_lowmem.config import ConfigError, DataConfig, MemoryPlan, ModelConfig, Profile
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.blend import (
    Blend,
    Mode,
    animation_weights,
    blend_images,
    matrix_weights,
    mix_normals,
    parse_split,
    parse_weights,
    path_weights,
    save_animation,
    spherical,
    strip_picture,
)
from nvae_lowmem.generation.images import load_images
from nvae_lowmem.generation.reconstruct import RowNoise, reconstruct
from nvae_lowmem.model.latents import FromPosterior, Noise, NoNoise, Normal
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.checkpoint import export_weights

SMALL = {
    "channels_encoder": 4, "channels_decoder": 4, "scales": 2, "groups_per_scale": (2, 1), "latents": 2,
    "cells_encoder": 1, "cells_decoder": 1, "preprocess_blocks": 1, "preprocess_cells": 1, "postprocess_blocks": 1,
    "postprocess_cells": 1,
}  # fmt: skip
GREY = ModelConfig(image_channels=1, image_size=12, padding=2, bits=1, **SMALL)
RGB = ModelConfig(image_channels=3, image_size=16, bits=5, mixtures=2, flows=1, **SMALL)
PLAIN = ModelConfig(image_channels=1, image_size=8, bits=1, **SMALL | {"scales": 1, "groups_per_scale": (1,)})
DEEP = ModelConfig(image_channels=1, image_size=16, bits=1, **SMALL | {"scales": 3, "groups_per_scale": (4, 2, 1)})
MODES: tuple[Mode, ...] = get_args(Mode)


def build(config: ModelConfig) -> NVAE:
    """A random model whose latents matter: the posteriors of two images are far apart."""
    torch.manual_seed(0)
    model = NVAE(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "log_norm" in name and (".posterior." in name or ".combiner." in name or ".head." in name):
                value += 0.5
    return model


def pair_for(config: ModelConfig) -> Tensor:
    side = config.network_size
    return torch.rand(2, config.image_channels, side, side, generator=torch.Generator().manual_seed(1)).round()


def latents_of(model: NVAE, maps: list[Tensor], source: Blend | FromPosterior) -> list[Tensor]:
    with torch.no_grad():
        latents = model.top_down(source, [*maps], keep_z=True)[1]
    return [latent.z for latent in latents if latent.z is not None]


def encode(model: NVAE, config: ModelConfig) -> list[Tensor]:
    with torch.no_grad():
        return model.encode(pair_for(config))


def constant(weight: float, config: ModelConfig) -> Tensor:
    return torch.full((1, config.total_groups), weight)


# --- mixing -----------------------------------------------------------------------------------------------------------


def normals(seed: int) -> tuple[Normal, Normal]:
    generator = torch.Generator().manual_seed(seed)
    mu = [torch.randn(1, 2, 3, 3, generator=generator) for _ in range(2)]
    sigma = [torch.randn(1, 2, 3, 3, generator=generator).mul(2).exp() for _ in range(2)]
    return Normal(mu[0], sigma[0]), Normal(mu[1], sigma[1])


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1, width=32))
def test_mixed_normals_lie_between_and_end_exactly(seed: int, share: float) -> None:
    a, b = normals(seed)
    for weight, end in ((0.0, a), (1.0, b)):
        mixed = mix_normals(a, b, torch.full((1, 1, 1, 1), weight))
        assert torch.equal(mixed.mu, end.mu) and torch.equal(mixed.sigma, end.sigma)
    mixed = mix_normals(a, b, torch.full((1, 1, 1, 1), share))
    torch.testing.assert_close(mixed.mu, (1 - share) * a.mu + share * b.mu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.sigma, a.sigma ** (1 - share) * b.sigma**share, rtol=1e-4, atol=0)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1, width=32))
def test_mixed_noise_keeps_its_length_and_ends_exactly(seed: int, share: float) -> None:
    a, b = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    b *= a.norm() / b.norm()
    weights = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    ends = spherical(a, b, weights)
    assert torch.equal(ends[0], a[0]) and torch.equal(ends[1], b[1])
    a, b = a[:1], b[:1] * (a[:1].norm() / b[:1].norm())
    mixed = spherical(a, b, torch.full((1, 1, 1, 1), share))
    torch.testing.assert_close(mixed.norm(), a.norm(), rtol=1e-4, atol=0)
    whole, part = (torch.acos((a * eps).sum() / a.norm().square()) for eps in (b, mixed))
    if share > 0.05:  # the arc cosine of nearly 1 has no digits left
        torch.testing.assert_close(part, share * whole, rtol=2e-2, atol=0)


def test_equal_or_absent_noise_stays_what_it_is() -> None:
    eps, half = torch.randn(1, 2, 3, 3), torch.full((1, 1, 1, 1), 0.5)
    torch.testing.assert_close(spherical(eps, eps.clone(), half), eps)
    assert not spherical(torch.zeros_like(eps), torch.zeros_like(eps), half).any()


# --- the source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREY, RGB, PLAIN], ids=["grey", "rgb with flows", "plain VAE"])
@pytest.mark.parametrize("noise", [RowNoise(3, (0, 1)), NoNoise()], ids=["sample", "mean"])
def test_weight_0_is_exactly_a_and_weight_1_exactly_b_in_every_group(config: ModelConfig, noise: Noise) -> None:
    model = build(config)
    maps = encode(model, config)
    own = latents_of(model, maps, FromPosterior(noise))
    for row in (0, 1):
        merged = latents_of(model, maps, Blend(constant(float(row), config).T, noise))
        assert all(torch.equal(z[row], expected[row]) for z, expected in zip(merged, own, strict=True))
        assert all(torch.equal(z[0], z[1]) for z in merged)  # both rows go on with the same z
    assert not any(torch.equal(z[0], z[1]) for z in own)


def test_later_groups_know_what_earlier_ones_became() -> None:
    """The coarse group from B: the fine posteriors of A are asked anew, given B's coarse group."""
    model, config = build(GREY), GREY
    maps = encode(model, config)
    own = latents_of(model, maps, FromPosterior(NoNoise()))
    merged = latents_of(model, maps, Blend(torch.tensor([[1.0], [0.0], [0.0]]), NoNoise()))
    assert torch.equal(merged[0][0], own[0][1])
    asked_anew, alone = merged[1][0], own[1][0]
    assert (asked_anew - alone).norm() > 1e-3
    rows = [encoded[[0, 0]] for encoded in maps]  # A's maps, B's coarse z: what the fine groups of A say to it
    crossed = latents_of(model, [maps[0][[1, 1]], *rows[1:]], FromPosterior(NoNoise()))
    torch.testing.assert_close(asked_anew, crossed[1][0])


@pytest.mark.parametrize("mode", ["linear", "simple"])
def test_a_blend_moves_from_a_to_b_without_turning_back(mode: Mode) -> None:
    model, steps = build(DEEP), 9
    maps = encode(model, DEEP)
    own = latents_of(model, maps, FromPosterior(NoNoise()))
    path = torch.linspace(0, 1, steps)
    if mode == "linear":
        rows = [encoded.repeat_interleave(steps, 0) for encoded in maps]
        z = [z[:steps] for z in latents_of(model, rows, Blend(path.expand(DEEP.total_groups, -1), NoNoise()))]
    else:
        z = [torch.lerp(ends[:1], ends[1:], path.view(-1, 1, 1, 1)) for ends in own]
    to_a, to_b = (
        torch.stack([(zs - ends[end]).square().sum((1, 2, 3)) for zs, ends in zip(z, own, strict=True)]).sum(0)
        for end in (0, 1)
    )
    assert (to_a.diff() > 0).all() and (to_b.diff() < 0).all()
    images = blend_images(model, pair_for(DEEP), path[:, None].expand(-1, DEEP.total_groups), mode, "mean")
    from_a, from_b = ((images - images[end]).square().sum((1, 2, 3)) for end in (0, -1))
    assert (from_a.diff() > 0).all() and (from_b.diff() < 0).all()


# --- blended images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb with flows"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_the_ends_of_every_path_are_the_reconstructions(config: ModelConfig, mode: Mode, posterior: str) -> None:
    model, pair = build(config), pair_for(config)
    for micro_batch in (1, 2, 6):
        expected = reconstruct(model, pair, 5, micro_batch, posterior).images
        blends = blend_images(model, pair, path_weights(config, mode, "1", "", 4), mode, posterior, 5, micro_batch)
        assert torch.equal(blends[0], expected[0]) and torch.equal(blends[-1], expected[1])
        assert not torch.allclose(blends[1], expected[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "simple"])
def test_a_blend_near_its_end_is_near_the_reconstruction(mode: Mode) -> None:
    """The ends come from the pass of the reconstructions, everything else from that of the blends: they must meet."""
    model, pair = build(RGB), pair_for(RGB)
    ends = blend_images(model, pair, torch.tensor([[0.0], [1.0]]).expand(-1, 3), mode)
    near = blend_images(model, pair, torch.tensor([[1e-7], [1 - 1e-7]]).expand(-1, 3), mode)
    torch.testing.assert_close(near, ends, rtol=0, atol=1e-5)
    assert (ends[0] - ends[1]).abs().max() > 0.02


@pytest.mark.parametrize("mode", MODES)
def test_blends_do_not_depend_on_chunks(mode: Mode) -> None:
    model, pair = build(RGB), pair_for(RGB)
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    whole = blend_images(model, pair, weights, mode, micro_batch=10)
    parts = blend_images(model, pair, weights, mode, micro_batch=4, progress=lambda *now: seen.append(now))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert seen == ([(4, 5), (5, 5)] if mode == "simple" else [(2, 5), (4, 5), (5, 5)])


def test_modes_differ_where_groups_depend_on_each_other() -> None:
    model, pair, weights = build(GREY), pair_for(GREY), torch.tensor([[1.0, 0.0, 0.0]])
    merged, simple = (blend_images(model, pair, weights, mode, "mean") for mode in ("linear", "simple"))
    assert (merged - simple).abs().max() > 1e-4


# --- where a blend goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "from_the_top"),
    [
        ("0.5", [0.5] * 7),
        ("0,0.5,1", [1, 0.5, 0.5, 0, 0, 0, 0]),  # per scale, the highest resolution (four groups) first
        ("0,.1,.2,.3,.4,.5,.6", [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),  # per group, the finest first
    ],
)
def test_weights_are_given_highest_resolution_first(text: str, from_the_top: list[float]) -> None:
    torch.testing.assert_close(parse_weights(text, DEEP), torch.tensor(from_the_top))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-0.1", "every weight must be from 0"),
        ("1.1", "every weight must be from 0"),
        ("nan", "every weight must be from 0"),
        ("0,1", "2 weights; give 1 for all, 3 for the scales or 7 for the groups"),
        ("much", "must be numbers with commas"),
        ("", "must be numbers with commas"),
    ],
)
def test_bad_weights_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--weights {text}: .*{message}"):
        parse_weights(text, DEEP)


def test_split_counts_scales_or_groups_from_the_lowest_resolution() -> None:
    assert [parse_split(f"scale:{n}", DEEP) for n in range(4)] == [0, 1, 3, 7]
    assert [parse_split(f"group:{n}", DEEP) for n in (0, 2, 7)] == [0, 2, 7]
    assert parse_split("", DEEP) == 1 and parse_split("", PLAIN) == 0
    for text in ("scale:4", "group:8", "group:-1", "scale", "2", "layer:1", "scale:x"):
        with pytest.raises(ConfigError, match=f"--split {text}: must be scale:N"):
            parse_split(text, DEEP)


@given(st.integers(1, 12))
def test_strips_go_from_a_to_b_in_even_steps(steps: int) -> None:
    strip = path_weights(DEEP, "linear", "0,0.5,1", "", steps)
    assert strip.shape == (steps, 7) and torch.equal(strip[-1], parse_weights("0,0.5,1", DEEP))
    if steps > 1:
        assert not strip[0].any()
        torch.testing.assert_close(strip.diff(dim=0), (strip[-1] / (steps - 1)).expand(steps - 1, -1))
    scales = path_weights(DEEP, "scales", "1", "", steps)
    assert set(scales.unique().tolist()) <= {0.0, 1.0} and len(scales) == min(steps, 8)
    assert (scales.diff(dim=1) >= 0).all()  # coarse groups from A, fine ones from B
    shares = scales.sum(1)
    assert (shares.diff() > 0).all() and (steps == 1 or (shares[0] == 0 and shares[-1] == 7))


def test_scales_take_the_coarse_from_a_and_the_fine_from_b() -> None:
    assert path_weights(DEEP, "scales", "1", "scale:2", 9).tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def test_matrix_has_the_images_and_their_crosses_in_its_corners() -> None:
    matrix = matrix_weights(DEEP, "linear", "scale:1", 3).view(3, 3, 7)
    assert matrix[0, 0].tolist() == [0] * 7 and matrix[-1, -1].tolist() == [1] * 7
    assert matrix[-1, 0].tolist() == [1, 0, 0, 0, 0, 0, 0] and matrix[0, -1].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert matrix[1, 2].tolist() == [0.5, 1, 1, 1, 1, 1, 1]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_strip_shows_the_images_above_their_blends() -> None:
    images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    picture = strip_picture(images[:2], images[2:], ["a", "b"])
    blends = grids.grid(images[2:], 5)
    assert np.array_equal(picture[-blends.shape[0] :], blends)


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
    for frames, name, message in ((5, "a.mp4", "must end in"), (1, "a.gif", "at least 2"), (5, "x/a.gif", "folder")):
        with pytest.raises(ConfigError, match=message):
            animation_weights(DEEP, "linear", "1", frames, str(tmp_path / name))


# --- launch/blend.py --------------------------------------------------------------------------------------------------


def run_of(config: ModelConfig, folder: Path) -> Path:
    data = DataConfig(source=str(folder / "gone"))  # a blend needs the model alone
    profile = Profile(name="t", model=config, data=data, plan=MemoryPlan(micro_batch=4))
    export_weights(folder, profile, build(config).state_dict())
    return folder


def picture_file(path: Path, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_command_writes_strip_matrix_and_animation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(RGB, tmp_path / "run")
    paths = [picture_file(tmp_path / f"{name}.png", seed) for seed, name in enumerate("ab")]
    animation = tmp_path / "morph.gif"
    arguments = [*paths, "--run", str(run), "--device", "cpu", "--steps", "3", "--matrix", "2", "--frames", "3"]
    assert main([*arguments, "--animation", str(animation), "--seed", "4"]) == 0
    written = [run / "samples" / "blend-linear-a-b.png", run / "samples" / "blend-linear-a-b-matrix.png", animation]
    assert capsys.readouterr().out.splitlines()[1:] == [str(path) for path in written]
    pair = load_images(paths, Profile(model=RGB))
    images = blend_images(build(RGB), pair, path_weights(RGB, "linear", "1", "", 3), seed=4, micro_batch=4)
    strip, expected = np.asarray(Image.open(written[0])), grids.grid(images, 16)
    assert np.abs(strip[-expected.shape[0] :].astype(int) - expected).max() <= 1
    corners = grids.grid(images[[0, 0, 2, 2]], 2)  # of which the first and the last are the ends of the strip, too
    matrix = np.asarray(Image.open(written[1]))[-corners.shape[0] :, : corners.shape[1]]
    assert np.array_equal(matrix[:58, :58], corners[:58, :58]) and np.array_equal(
        matrix[-58:, -58:], corners[-58:, -58:]
    )


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
        (["A", "A", "--micro-batch", "-2"], "--micro-batch -2: must be at least 1"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run_of(GREY, tmp_path / "runs" / "00000-t")
    files = {"A": picture_file(tmp_path / "a.png", 0), "TEXT": str(tmp_path / "note.png")}
    Path(files["TEXT"]).write_text("no image")
    assert main(["--runs-dir", str(tmp_path / "runs"), *(files.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("blend.py: ") and error.count("\n") == 1


def test_two_images_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a.png"]) == 2
    assert "1 image given: name two of them, or none for two held-out ones" in capsys.readouterr().err


def test_a_split_without_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a.png", "b.png", "--split", "scale:1"]) == 2
    assert "--split scale:1 belongs to --mode scales and to --matrix" in capsys.readouterr().err


def test_help_says_in_which_order_weights_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "HIGHEST RESOLUTION" in " ".join(capsys.readouterr().out.replace("│", " ").split())
