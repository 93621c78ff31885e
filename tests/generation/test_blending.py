"""Blends: exact at their ends, merged from the top down in between."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from generation_runs import DEEP, GREY, PLAIN, RGB, images_for, responsive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae_lowmem.config.choices import BlendMode
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.generation.blend import MergedPosteriors, blend_images, mix_normals, path_weights, spherical
from nvae_lowmem.generation.reconstruct import RowNoise, reconstruct
from nvae_lowmem.model.latents import FromPosterior, Noise, NoNoise, Normal
from nvae_lowmem.model.nvae import NVAE

MODES: tuple[BlendMode, ...] = get_args(BlendMode)


def latents_of(model: NVAE, maps: list[Tensor], source: MergedPosteriors | FromPosterior) -> list[Tensor]:
    with torch.no_grad():
        latents = model.top_down(source, [*maps], return_z=True)[1]
    return [latent.z for latent in latents if latent.z is not None]


def encode(model: NVAE, config: ModelConfig) -> list[Tensor]:
    with torch.no_grad():
        return model.encode(images_for(config, 2))


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
    model = responsive(config)
    maps = encode(model, config)
    own = latents_of(model, maps, FromPosterior(noise))
    for row in (0, 1):
        merged = latents_of(model, maps, MergedPosteriors(constant(float(row), config).T, noise))
        assert all(torch.equal(z[row], expected[row]) for z, expected in zip(merged, own, strict=True))
        assert all(torch.equal(z[0], z[1]) for z in merged)  # both rows go on with the same z
    assert not any(torch.equal(z[0], z[1]) for z in own)


def test_later_groups_know_what_earlier_ones_became() -> None:
    """The coarse group from B: the fine posteriors of A are asked anew, given B's coarse group."""
    model, config = responsive(GREY), GREY
    maps = encode(model, config)
    own = latents_of(model, maps, FromPosterior(NoNoise()))
    merged = latents_of(model, maps, MergedPosteriors(torch.tensor([[1.0], [0.0], [0.0]]), NoNoise()))
    assert torch.equal(merged[0][0], own[0][1])
    asked_anew, alone = merged[1][0], own[1][0]
    assert (asked_anew - alone).norm() > 1e-3
    rows = [encoded[[0, 0]] for encoded in maps]  # A's maps, B's coarse z: what the fine groups of A say to it
    crossed = latents_of(model, [maps[0][[1, 1]], *rows[1:]], FromPosterior(NoNoise()))
    torch.testing.assert_close(asked_anew, crossed[1][0])


@pytest.mark.parametrize("mode", ["linear", "simple"])
def test_a_blend_moves_from_a_to_b_without_turning_back(mode: BlendMode) -> None:
    model, steps = responsive(DEEP), 9
    maps = encode(model, DEEP)
    own = latents_of(model, maps, FromPosterior(NoNoise()))
    path = torch.linspace(0, 1, steps)
    if mode == "linear":
        rows = [encoded.repeat_interleave(steps, 0) for encoded in maps]
        z = [
            z[:steps] for z in latents_of(model, rows, MergedPosteriors(path.expand(DEEP.total_groups, -1), NoNoise()))
        ]
    else:
        z = [torch.lerp(ends[:1], ends[1:], path.view(-1, 1, 1, 1)) for ends in own]
    to_a, to_b = (
        torch.stack([(zs - ends[end]).square().sum((1, 2, 3)) for zs, ends in zip(z, own, strict=True)]).sum(0)
        for end in (0, 1)
    )
    assert (to_a.diff() > 0).all() and (to_b.diff() < 0).all()
    images = blend_images(model, images_for(DEEP, 2), path[:, None].expand(-1, DEEP.total_groups), mode, "mean")
    from_a, from_b = ((images - images[end]).square().sum((1, 2, 3)) for end in (0, -1))
    assert (from_a.diff() > 0).all() and (from_b.diff() < 0).all()


# --- blended images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb with flows"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_the_ends_of_every_path_are_the_reconstructions(config: ModelConfig, mode: BlendMode, posterior: str) -> None:
    model, pair = responsive(config), images_for(config, 2)
    for micro_batch in (1, 2, 6):
        expected = reconstruct(model, pair, 5, micro_batch, posterior).images
        blends = blend_images(model, pair, path_weights(config, mode, "1", "", 4), mode, posterior, 5, micro_batch)
        assert torch.equal(blends[0], expected[0]) and torch.equal(blends[-1], expected[1])
        assert not torch.allclose(blends[1], expected[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "simple"])
def test_a_blend_near_its_end_is_near_the_reconstruction(mode: BlendMode) -> None:
    """The ends come from the pass of the reconstructions, everything else from that of the blends: they must meet."""
    model, pair = responsive(RGB), images_for(RGB, 2)
    ends = blend_images(model, pair, torch.tensor([[0.0], [1.0]]).expand(-1, 3), mode)
    near = blend_images(model, pair, torch.tensor([[1e-7], [1 - 1e-7]]).expand(-1, 3), mode)
    torch.testing.assert_close(near, ends, rtol=0, atol=1e-5)
    assert (ends[0] - ends[1]).abs().max() > 0.02


@pytest.mark.parametrize("mode", MODES)
def test_blends_do_not_depend_on_chunks(mode: BlendMode) -> None:
    model, pair = responsive(RGB), images_for(RGB, 2)
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    whole = blend_images(model, pair, weights, mode, micro_batch=10)
    parts = blend_images(model, pair, weights, mode, micro_batch=4, progress=lambda *now: seen.append(now))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert seen == ([(4, 5), (5, 5)] if mode == "simple" else [(2, 5), (4, 5), (5, 5)])


def test_modes_differ_where_groups_depend_on_each_other() -> None:
    model, pair, weights = responsive(GREY), images_for(GREY, 2), torch.tensor([[1.0, 0.0, 0.0]])
    merged, simple = (blend_images(model, pair, weights, mode, "mean") for mode in ("linear", "simple"))
    assert (merged - simple).abs().max() > 1e-4
