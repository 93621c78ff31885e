"""Sampling by class: who gets which label, what guidance is, and what does not depend on how images are split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from generation_runs import RGB, TINY, seasoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.generation.classes import labels_in_turn, parse_classes
from nvae_lowmem.generation.recalibrate import recalibrate
from nvae_lowmem.generation.sample import sample_images
from nvae_lowmem.memory.trace.inference import Work, trace_generation
from nvae_lowmem.model.latents import FromPrior, Guided, Latent, NoNoise, Normal, SeededNoise
from nvae_lowmem.model.nvae import NVAE

LABELLED = replace(RGB, classes=3)
NAMED = Profile(model=LABELLED, data=DataConfig(class_names=("cat", "dog", "2 birds")))
numbers = st.floats(-3, 3, width=32)


def labelled() -> NVAE:
    """With tables that tell the classes apart."""
    model = seasoned(LABELLED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model


# -- which class --


def test_classes_are_asked_for_by_name_and_by_number() -> None:
    assert parse_classes(["dog", 2, "0"], NAMED) == (1, 2, 0)
    assert parse_classes(["all", "none"], NAMED) == (0, 1, 2, -1)
    assert parse_classes([], NAMED) == ()
    with pytest.raises(ConfigError, match="did you mean 'cat'"):
        parse_classes(["cats"], NAMED)
    with pytest.raises(ConfigError, match="a number below 3"):
        parse_classes(["3"], NAMED)


def test_a_model_without_labels_has_no_classes_and_no_guidance() -> None:
    with pytest.raises(ConfigError, match="--class 0: this model was trained without class labels"):
        parse_classes(["0"], Profile(model=RGB))
    with pytest.raises(ConfigError, match="--guidance 2: this model was trained without"):
        sample_images(seasoned(RGB), 1, 0.7, 0, 1, guidance=2.0)


@pytest.mark.parametrize("guidance", [-0.5, float("nan"), float("inf"), 101.0])
def test_a_guidance_that_is_none_is_one_message(guidance: float) -> None:
    with pytest.raises(ConfigError, match=f"--guidance {guidance:g}: must be from 0"):
        sample_images(labelled(), 1, 0.7, 0, 1, guidance=guidance)


def test_classes_take_turns_by_the_number_of_the_image() -> None:
    model = labelled()
    rows = labels_in_turn(model, 4, 4)
    assert rows is not None and rows.argmax(1).tolist() == [1, 2, 0, 1]
    rows = labels_in_turn(model, 1, 3, (2, -1))
    assert rows is not None and rows.argmax(1).tolist() == [3, 2, 3]
    assert labels_in_turn(seasoned(RGB), 0, 4) is None


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1.0, 0.0, 2.5]), st.sampled_from([(), (2,), (0, -1)]))
def test_images_do_not_depend_on_chunks_or_count(
    micro_batch: int, count: int, guidance: float, classes: tuple[int, ...]
) -> None:
    model = labelled()
    whole = sample_images(model, 7, 0.8, 3, 14, classes=classes, guidance=guidance)
    chunked = sample_images(model, count, 0.8, 3, micro_batch, classes=classes, guidance=guidance)
    torch.testing.assert_close(chunked, whole[:count], rtol=0, atol=1e-6)


def test_an_image_is_that_of_its_class_alone() -> None:
    model = labelled()
    turns, alone = (sample_images(model, 3, 0.8, 3, 3, classes=c) for c in ((), (1,)))
    torch.testing.assert_close(turns[1], alone[1], rtol=0, atol=1e-6)
    assert not torch.allclose(turns[0], alone[0], atol=1e-3)


# -- guidance --


def test_guidance_1_is_the_class_and_0_is_none() -> None:
    model = labelled()
    plain, none = (sample_images(model, 2, 0.8, 3, 4, classes=(c,)) for c in (1, -1))
    close = sample_images(model, 2, 0.8, 3, 4, classes=(1,), guidance=1 + 1e-6)
    torch.testing.assert_close(close, plain, rtol=0, atol=1e-4)
    assert not torch.allclose(plain, none, atol=1e-3)
    far = [sample_images(model, 2, 0.8, 3, 4, classes=(1,), guidance=g) for g in (2.0, 4.0)]
    assert not torch.allclose(far[0], plain, atol=1e-3) and not torch.allclose(*far, atol=1e-3)


class Seen:
    """A source that remembers the prior it was given."""

    def latent(self, group: int, prior: Normal, posterior: Any, flow: Any) -> Latent:
        self.prior = prior
        return FromPrior(NoNoise()).latent(group, prior, posterior, flow)


def guided(mu: list[float], sigma: list[float], guidance: float) -> tuple[Normal, Tensor]:
    """Of one image: what its source is given, and the z that comes back. First the label's, then the one without."""
    seen = Seen()
    prior = Normal(*(torch.tensor(values, dtype=torch.float64).view(2, 1, 1, 1) for values in (mu, sigma)))
    z = Guided(seen, guidance).latent(1, prior, None, None).z
    assert z is not None
    return seen.prior, z


@settings(max_examples=100, deadline=None)
@given(numbers, numbers, st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0, 8))
def test_guidance_extrapolates_the_prior_and_never_widens_it(
    mu: float, mu_none: float, sigma: float, sigma_none: float, guidance: float
) -> None:
    prior, z = guided([mu, mu_none], [sigma, sigma_none], guidance)
    assert prior.mu.item() == pytest.approx(mu_none + guidance * (mu - mu_none), abs=1e-6)
    extrapolated = sigma_none * (sigma / sigma_none) ** guidance
    assert prior.sigma.item() == pytest.approx(min(extrapolated, max(sigma, sigma_none)), rel=1e-6)
    assert z.shape == (2, 1, 1, 1) and torch.equal(z[0], z[1])  # both rows go on with one z


# -- statistics and memory --


def test_statistics_are_taken_over_all_classes() -> None:
    found, expected = labelled(), labelled()
    recalibrate(found, 0.7, 2, 4, 0)
    layers = [m for name, m in expected.named_modules() if ".dec_" in f".{name}" or name.startswith("blocks.post")]
    for module in layers:
        module.training = True
    noise = SeededNoise(0, -4)
    rows = torch.eye(4)
    with torch.no_grad():
        for step in range(2):
            expected.settings.momentum = 1 / (step + 1)
            labels = rows[[(step * 4 + i) % 3 for i in range(4)]]
            expected.top_down(FromPrior(noise.at(step * 4), [0.7] * LABELLED.total_groups), batch=4, labels=labels)
    for (name, ours), (_, theirs) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        if ".dec_" in name and "running" in name:
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("work", ["sampling", "recalibration", "pictures"])
def test_work_without_memory_is_traced_as_it_really_is(work: Work) -> None:
    tiny = replace(TINY, image_channels=3, image_size=8, padding=0, bits=8, mixtures=2, latents=3, classes=4)
    profile = Profile(model=tiny).with_plan(engine="torch", precision="fp32")
    traced, real = (trace_generation(profile, work, 4, fake=fake) for fake in (True, False))
    assert traced.events == real.events and traced.peak() == real.peak()


def test_guidance_takes_no_more_memory_than_sampling_without() -> None:
    model = replace(TINY, image_channels=3, image_size=8, padding=0, bits=8, mixtures=2, latents=3)
    profiles = [Profile(model=replace(model, classes=n)).with_plan(engine="torch", precision="fp32") for n in (0, 4)]
    plain, guided = (trace_generation(profile, "sampling", 4).peak() for profile in profiles)
    assert guided.nbytes < 1.02 * plain.nbytes
