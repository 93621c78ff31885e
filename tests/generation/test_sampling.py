"""Sampling: an image is decided by seed and temperature alone, not by the chunks it is drawn in."""

from __future__ import annotations

import pytest
import torch
from generation_runs import GREY, RGB, seasoned
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.sample import (
    group_temperatures,
    parse_temperature,
    reconstruct_images,
    sample_images,
    temperature_text,
)
from nvae_lowmem.model.latents import FromPrior, SeededNoise


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("likelihood_sample", [False, True], ids=["mean", "sample"])
def test_images_have_the_datas_size_and_range(config: ModelConfig, likelihood_sample: bool) -> None:
    images = sample_images(seasoned(config), 3, 1.0, 0, 2, likelihood_sample)
    assert images.shape == (3, config.image_channels, config.image_size, config.image_size)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
    on_grid = images * (2**config.bits - 1)
    assert torch.allclose(on_grid, on_grid.round(), atol=1e-4) == likelihood_sample


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(-(2**63), 2**64 - 1))
def test_images_do_not_depend_on_chunks_or_count(micro_batch: int, count: int, seed: int) -> None:
    model = seasoned(RGB)
    whole, chunked = sample_images(model, 7, 0.8, seed, 7), sample_images(model, count, 0.8, seed, micro_batch)
    assert whole.std(0).max() > 1e-3  # the images differ from one another
    torch.testing.assert_close(chunked, whole[:count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [GREY, RGB], ids=["grey", "rgb"])
def test_drawn_pixels_do_not_depend_on_chunks(config: ModelConfig) -> None:
    model = seasoned(config)
    whole, chunked = (sample_images(model, 5, 1.0, 3, micro_batch, True) for micro_batch in (5, 2))
    # a parameter's last bit may put a pixel on the other side of a rounding edge, which hardly ever happens
    assert (whole != chunked).float().mean() < 1e-3
    assert (whole[0] != whole[1]).float().mean() > 0.1


def test_seed_and_temperature_decide_the_image() -> None:
    model = seasoned(GREY)
    assert torch.equal(sample_images(model, 2, 0.7, 1, 2), sample_images(model, 2, 0.7, 1, 2))
    assert not torch.allclose(sample_images(model, 2, 0.7, 1, 2), sample_images(model, 2, 0.7, 2, 2), atol=1e-4)
    frozen = sample_images(model, 2, 0.0, 1, 2)
    torch.testing.assert_close(frozen[0], frozen[1], rtol=0, atol=1e-6)  # every latent at its mean


def test_temperatures_per_scale_reach_their_groups() -> None:
    assert group_temperatures(0.7, GREY) == (0.7, 0.7, 0.7)
    assert group_temperatures((0.9, 0.0), GREY) == (0.0, 0.9, 0.9)  # highest resolution first -> groups from the top
    source = FromPrior(SeededNoise(0), group_temperatures((0.9, 0.0), GREY))
    _, latents = seasoned(GREY).top_down(source, batch=2, return_z=True)
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
        sample_images(seasoned(GREY), 1, (0.7, 0.8, 0.9), 0, 1)


def test_reconstructions_do_not_depend_on_chunks() -> None:
    model, images = seasoned(RGB), torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, chunked = (reconstruct_images(model, images, 0, micro_batch) for micro_batch in (5, 2))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    assert not torch.allclose(whole, reconstruct_images(model, images.flip(0), 0, 5), atol=1e-4)  # they see the images


def test_progress_counts_images() -> None:
    seen: list[tuple[int, int]] = []
    sample_images(seasoned(GREY), 5, 0.7, 0, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
