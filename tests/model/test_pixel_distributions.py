"""Pixel distributions: probabilities sum to one, agree with the textbook, and samples and means follow them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood_cases import all_pixel_values, every_kind, random_images, random_parameters
from torch import Tensor

from nvae_lowmem.model.pixel_distributions import (
    Bernoulli,
    DiscretisedNormal,
    Likelihood,
    LogisticMixture,
    SquaredError,
    quantise,
)


def total_probability(likelihood: Likelihood, pixel: Tensor) -> Tensor:
    """Sum of the probabilities of all values of one pixel with parameters (1, P, 1, 1)."""
    colours = all_pixel_values(likelihood).to(pixel.dtype)
    return likelihood.log_prob(pixel.expand(len(colours), -1, 1, 1), colours).exp().sum()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["mixture", "single", "normal"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_probabilities_of_all_values_of_a_grey_pixel_sum_to_one(kind: str, bits: int, seed: int, spread: float) -> None:
    kinds = {
        "mixture": LogisticMixture(1, bits, 10),
        "single": LogisticMixture(1, bits, 1),
        "normal": DiscretisedNormal(1, bits),
    }
    pixel = random_parameters(kinds[kind], 1, 1, 1, seed=seed, spread=spread)
    assert abs(total_probability(kinds[kind], pixel) - 1) < 1e-9
    assert abs(total_probability(kinds[kind], pixel.float()) - 1) < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("kind", [LogisticMixture, DiscretisedNormal])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20))
def test_probabilities_of_all_colours_of_an_rgb_pixel_sum_to_one(kind: type, bits: int, seed: int) -> None:
    likelihood = kind(3, bits)
    pixel = random_parameters(likelihood, 1, 1, 1, seed=seed)
    assert abs(total_probability(likelihood, pixel) - 1) < 1e-9


@pytest.mark.parametrize("likelihood", [Bernoulli(1), Bernoulli(3), LogisticMixture(2, 3, 4)])
def test_probabilities_sum_to_one_for_other_channel_counts(likelihood: Likelihood) -> None:
    assert abs(total_probability(likelihood, random_parameters(likelihood, 1, 1, 1)) - 1) < 1e-9


def test_five_bits_are_priced_as_five_bits_and_not_as_eight() -> None:
    """A wide, centred logistic gives a value about its density times the bin's width, 2 / 31, not 2 / 255."""
    for likelihood in (LogisticMixture(1, 5, 1), DiscretisedNormal(1, 5)):
        parameters = torch.zeros(1, likelihood.parameter_channels, 1, 1, dtype=torch.float64)
        x = torch.full((1, 1, 1, 1), 15 / 31, dtype=torch.float64)
        density = 0.25 if isinstance(likelihood, LogisticMixture) else 1 / (1.01 * math.sqrt(2 * math.pi))
        assert likelihood.log_prob(parameters, x).item() == pytest.approx(math.log(density * 2 / 31), abs=2e-3)


def test_published_formula_counts_the_second_highest_8_bit_value_as_a_highest_one() -> None:
    parameters = torch.zeros(1, 100, 1, 1, dtype=torch.float64)
    parameters[:, 20:30] = parameters[:, 50:60] = parameters[:, 80:90] = -1.0
    exact, published = LogisticMixture(3, 8), LogisticMixture(3, 8, published_edges=True)
    for level, agrees in [(0, True), (1, True), (128, True), (253, True), (254, False), (255, True)]:
        x = torch.full((1, 3, 1, 1), level / 255, dtype=torch.float64)
        difference = (published.log_prob(parameters, x) - exact.log_prob(parameters, x)).item()
        assert (abs(difference) < 1e-9) == agrees, level
        assert difference > -1e-9


def published_log_prob(parameters: list[float], rgb: list[float], mixtures: int, bits: int) -> float:
    """One pixel by the textbook formula (PixelCNN++, section 2.1, with tanh coefficients), in plain Python."""
    blocks = [parameters[start : start + mixtures] for start in range(0, len(parameters), mixtures)]
    r, g, b = (2 * value - 1 for value in rgb)
    half_bin = 1 / (2**bits - 1)
    joint = []
    for k in range(mixtures):
        (m_r, m_g, m_b), log_scales, (c0, c1, c2) = (
            [blocks[1 + 3 * colour + field][k] for colour in range(3)] for field in range(3)
        )
        locations = [m_r, m_g + math.tanh(c0) * r, m_b + math.tanh(c1) * r + math.tanh(c2) * g]
        log_component = blocks[0][k]
        for x, location, log_scale in zip((r, g, b), locations, log_scales, strict=True):
            log_component += published_log_bin(x, x - location, max(log_scale, -7.0), half_bin)
        joint.append(log_component)
    return log_sum_exp(joint) - log_sum_exp(blocks[0])


def published_log_bin(x: float, offset: float, log_scale: float, half_bin: float) -> float:
    log_upper = log_sigmoid((offset + half_bin) / math.exp(log_scale))
    log_above_lower = log_sigmoid(-(offset - half_bin) / math.exp(log_scale))
    if x < -0.999:
        return log_upper
    if x > 0.99:
        return log_above_lower
    mass = math.exp(log_upper) - (1 - math.exp(log_above_lower))
    if mass > 1e-5:
        return math.log(mass)
    z = offset / math.exp(log_scale)
    return log_sigmoid(z) + log_sigmoid(-z) - log_scale + math.log(2 * half_bin)


def log_sigmoid(value: float) -> float:
    return min(value, 0.0) - math.log1p(math.exp(-abs(value)))


def log_sum_exp(values: list[float]) -> float:
    return max(values) + math.log(sum(math.exp(value - max(values)) for value in values))


@pytest.mark.parametrize("published_edges", [True, False])
def test_rgb_mixture_agrees_with_the_textbook_formula_in_plain_python(published_edges: bool) -> None:
    """Layout, coupling, clamp and edges. The exact variant agrees where no bin is narrow and no value is 254."""
    likelihood = LogisticMixture(3, 8, 4, published_edges=published_edges)
    parameters = random_parameters(likelihood, 1, 6, 6, spread=0.5)
    if not published_edges:
        for start in (8, 20, 32):
            parameters[:, start : start + 4].uniform_(-2.0, 0.0, generator=torch.Generator().manual_seed(2))
    x = random_images(likelihood, 1, 6, 6)
    x[0, :, 0, 0] = 253 / 255 if not published_edges else 254 / 255
    actual = likelihood.log_prob_per_pixel(parameters, x)
    for row, column in itertools.product(range(6), range(6)):
        pixel, rgb = parameters[0, :, row, column].tolist(), x[0, :, row, column].tolist()
        assert actual[0, row, column].item() == pytest.approx(published_log_prob(pixel, rgb, 4, 8), rel=1e-9)


@pytest.mark.parametrize(
    "likelihood", [LogisticMixture(1, 8, 3), LogisticMixture(3, 8), DiscretisedNormal(3, 8), Bernoulli(1)]
)
def test_float32_stays_finite_and_close_to_float64_for_extreme_parameters(likelihood: Likelihood) -> None:
    parameters = random_parameters(likelihood, 2, 8, 8, spread=40.0).requires_grad_()
    x = random_images(likelihood, 2, 8, 8)
    exact = likelihood.log_prob(parameters, x)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), parameters)
    single = parameters.detach().float().requires_grad_()
    actual = likelihood.log_prob(single, x.float())
    (gradient,) = torch.autograd.grad(actual.sum(), single)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=1e-2, atol=1e-3 * exact_gradient.abs().max().item()
    )


@every_kind
def test_half_precision_parameters_are_computed_in_float32(likelihood: Likelihood) -> None:
    parameters = random_parameters(likelihood, 2, 4, 4).to(torch.bfloat16)
    x = random_images(likelihood, 2, 4, 4).float()
    actual = likelihood.log_prob(parameters, x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, likelihood.log_prob(parameters.float(), x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(1), DiscretisedNormal(1, 2), LogisticMixture(1, 3, 3), LogisticMixture(3, 1), LogisticMixture(3, 2, 3)],
    ids=lambda likelihood: likelihood.describe(),
)
def test_frequencies_of_samples_are_the_probabilities(likelihood: Likelihood) -> None:
    draws = 40_000
    pixel = random_parameters(likelihood, 1, 1, 1, seed=5).clamp(-3.0, 1.0)
    samples = likelihood.sample(pixel.expand(draws, -1, 1, 1), torch.Generator().manual_seed(7))
    colours = all_pixel_values(likelihood)
    expected = likelihood.log_prob(pixel.expand(len(colours), -1, 1, 1), colours).exp()
    steps = 2**likelihood.bits - 1
    place = torch.tensor([(steps + 1) ** c for c in reversed(range(likelihood.image_channels))])
    index = ((samples[:, :, 0, 0] * steps).round().long() * place).sum(dim=1)
    frequency = torch.bincount(index, minlength=len(colours)) / draws
    assert (frequency - expected).abs().max() < 5 * 0.5 / math.sqrt(draws)  # five standard deviations at the most
    assert (frequency - expected).abs().sum() < 0.05


@every_kind
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_samples_lie_on_the_grid_of_the_data_and_follow_the_generator(
    likelihood: Likelihood, temperature: float
) -> None:
    parameters = random_parameters(likelihood, 2, 8, 8).float()
    first, again, other = (
        likelihood.sample(parameters, torch.Generator().manual_seed(seed), temperature) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (temperature == 0)
    assert first.shape == (2, likelihood.image_channels, 8, 8)
    assert 0 <= first.min() <= first.max() <= 1
    torch.testing.assert_close(quantise(first, likelihood.bits), first)


@pytest.mark.parametrize("likelihood", [DiscretisedNormal(1, 8), LogisticMixture(1, 8, 1), LogisticMixture(3, 8, 5)])
def test_a_lower_temperature_narrows_the_samples_in_proportion(likelihood: Likelihood) -> None:
    parameters = torch.zeros(1, likelihood.parameter_channels, 100, 100, dtype=torch.float64)
    if isinstance(likelihood, DiscretisedNormal):
        parameters[:, 1] = -2.5
    if isinstance(likelihood, LogisticMixture):
        for log_scales in parameters.split(likelihood.mixtures, dim=1)[2::3]:
            log_scales.fill_(-3.0)
    spread = [
        likelihood.sample(parameters, torch.Generator().manual_seed(0), temperature).std() for temperature in (1.0, 0.5)
    ]
    assert (spread[1] / spread[0]).item() == pytest.approx(0.5, rel=0.03)


def test_a_lower_temperature_prefers_the_heavier_component() -> None:
    likelihood = LogisticMixture(1, 8, 2)
    parameters = torch.zeros(1, 6, 100, 100)
    parameters[:, 0], parameters[:, 2], parameters[:, 3] = 1.0, -0.5, 0.5  # weights e : 1, means apart
    parameters[:, 4:] = -7.0
    for temperature, logit in [(1.0, 1.0), (0.5, 2.0)]:
        sample = likelihood.sample(parameters, torch.Generator().manual_seed(0), temperature)
        assert (sample < 0.5).float().mean().item() == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.02)


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(3), DiscretisedNormal(3, 8), LogisticMixture(2, 8, 3), LogisticMixture(3, 8, 3)],
    ids=lambda likelihood: likelihood.describe(),
)
def test_the_mean_is_what_samples_average_to(likelihood: Likelihood) -> None:
    pixel = random_parameters(likelihood, 1, 1, 1, seed=3, spread=0.2)
    if isinstance(likelihood, LogisticMixture):  # tails that stay inside [0, 1]; the mean clamps locations only
        blocks = pixel.split(likelihood.mixtures, dim=1)
        for log_scales in blocks[2 :: (len(blocks) - 1) // likelihood.image_channels]:
            log_scales.clamp_(max=-3.0)
    if isinstance(likelihood, DiscretisedNormal):
        pixel[:, 3:].clamp_(max=-2.0)
    samples = likelihood.sample(pixel.expand(20_000, -1, 1, 1), torch.Generator().manual_seed(1))
    torch.testing.assert_close(likelihood.mean(pixel)[0], samples.mean(dim=0), rtol=0, atol=0.02)


@every_kind
def test_means_are_images_for_any_parameters(likelihood: Likelihood) -> None:
    mean = likelihood.mean(random_parameters(likelihood, 2, 4, 4, spread=20.0).half())
    assert mean.shape == (2, likelihood.image_channels, 4, 4)
    assert mean.dtype == torch.float32
    assert 0 <= mean.min() <= mean.max() <= 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantise_keeps_the_highest_bits_of_every_8_bit_value(bits: int) -> None:
    levels = torch.arange(256)
    expected = (levels // 2 ** (8 - bits)).float() / (2**bits - 1)
    for images in (levels / 255.0, levels * (1 / 255), (levels / 127.5 - 1 + 1) / 2):
        quantised = quantise(images, bits)
        assert torch.equal(quantised, expected)
        assert torch.equal(quantise(quantised, bits), quantised)


def test_squared_error_is_a_normal_of_variance_one() -> None:
    likelihood = SquaredError(3, 8)
    generator = torch.Generator().manual_seed(0)
    mu, x = torch.rand(2, 4, 3, 5, 6, generator=generator, dtype=torch.float64)
    expected = torch.distributions.Normal(mu, 1.0).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(mu, x), expected)
    assert torch.equal(likelihood.mean(2 * mu - 0.5), (2 * mu - 0.5).clamp(0, 1))
    assert torch.equal(likelihood.sample(mu, generator, temperature=0.0), mu)
