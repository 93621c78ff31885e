"""Bounds on the evidence: the importance-weighted one against evidence that can be computed, and the ELBO."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from generation_runs import TINY, perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.data.pipeline import without_padding
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation import likelihood as evaluate
from nvae_lowmem.evaluation.bounds import elbo_of_images, importance_weighted_bound, log_mean_weight
from nvae_lowmem.evaluation.report import Mean
from nvae_lowmem.model.latents import Given, Normal
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.validation import validate

ONE_LATENT = ModelConfig(  # a plain VAE with one latent variable in all: its evidence is an integral over a line
    image_channels=1, image_size=4, bits=1, channels_encoder=4, channels_decoder=4, scales=1, groups=1, latents=1,
    preprocess_blocks=2, preprocess_cells=1, postprocess_blocks=2, postprocess_cells=1,
)  # fmt: skip


def images(model: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """(B, C, padded, padded), random on the grid of the configuration's bits."""
    shape, top = (count, model.image_channels, model.network_size, model.network_size), 2**model.bits - 1
    return torch.randint(0, top + 1, shape, generator=torch.Generator().manual_seed(seed)) / top


# --- the importance-weighted bound ------------------------------------------------------------------------------------


class LinearGaussian:
    """z ~ N(0, I), x = A z + s e, and q a normal around the true posterior, `widening` times as wide: float64.

    Has the interface of a model's densities. Its evidence is N(x; 0, A A' + s^2 I).
    """

    def __init__(self, images: int, widening: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        self.s = 0.7
        self.evidence = torch.distributions.MultivariateNormal(
            torch.zeros(5, dtype=torch.float64), self.a @ self.a.T + self.s**2 * torch.eye(5, dtype=torch.float64)
        )
        z = torch.randn(images, 2, generator=generator, dtype=torch.float64)
        self.x = z @ self.a.T + self.s * torch.randn(images, 5, generator=generator, dtype=torch.float64)
        covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + self.a.T @ self.a / self.s**2)
        mean = self.x @ self.a @ covariance / self.s**2
        self.q = torch.distributions.MultivariateNormal(mean, widening**2 * covariance)
        self.calls: list[tuple[range, range]] = []

    def __call__(self, images: range, draws: range) -> tuple[Tensor, Tensor]:
        self.calls.append((images, draws))
        rows = [
            self.q.loc[i] + torch.linalg.cholesky(self.q.covariance_matrix[i]) @ self._eps(i, j)
            for i in images
            for j in draws
        ]
        z = torch.stack(rows).view(len(images), len(draws), 2)
        inside = torch.distributions.Normal(z @ self.a.T, self.s)
        log_likelihood = inside.log_prob(self.x[images.start : images.stop, None]).sum(2)
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(2)
        log_q = torch.stack(
            [
                torch.distributions.MultivariateNormal(self.q.loc[i], self.q.covariance_matrix[i]).log_prob(z[n])
                for n, i in enumerate(images)
            ]
        )
        return log_likelihood + log_prior, log_q

    def _eps(self, image: int, draw: int) -> Tensor:
        return torch.randn(2, generator=torch.Generator().manual_seed(1000 * image + draw), dtype=torch.float64)


def test_with_the_true_posterior_one_draw_gives_the_evidence() -> None:
    toy = LinearGaussian(4, widening=1.0)
    assert torch.allclose(log_mean_weight(toy, 4, 1, 3), toy.evidence.log_prob(toy.x), rtol=0, atol=1e-10)


def test_with_many_draws_the_bound_reaches_the_evidence_from_below() -> None:
    toy = LinearGaussian(4, widening=2.0)
    evidence = toy.evidence.log_prob(toy.x)
    one, many = log_mean_weight(toy, 4, 1, 50), log_mean_weight(toy, 4, 3000, 1000)
    assert torch.allclose(many, evidence, rtol=0, atol=0.1)
    assert float((evidence - one).abs().max()) > 0.3  # what many draws had to make good


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 4), samples=st.integers(1, 9), micro_batch=st.integers(1, 12))
def test_the_split_into_passes_changes_nothing_and_no_pass_is_too_large(
    count: int, samples: int, micro_batch: int
) -> None:
    toy = LinearGaussian(count, widening=1.5)
    advanced: list[int] = []
    split = log_mean_weight(toy, count, samples, micro_batch, advanced.append)
    assert all(len(i) * len(j) <= micro_batch for i, j in toy.calls)
    pairs = [(i, j) for rows, draws in toy.calls for i in rows for j in draws]
    assert sorted(pairs) == [(i, j) for i in range(count) for j in range(samples)]
    assert sum(advanced) == len(pairs)
    whole = log_mean_weight(toy, count, samples, count * samples)
    assert torch.allclose(split, whole, rtol=0, atol=1e-12)


def test_weights_beyond_the_range_of_exp_are_no_problem() -> None:
    def densities(images: range, draws: range) -> tuple[Tensor, Tensor]:
        log_joint = torch.tensor([[-90_000.0, -90_001.0, -200_000.0]])[:, draws.start : draws.stop]
        return log_joint, torch.zeros_like(log_joint)

    expected = -90_000 + math.log1p(math.exp(-1)) - math.log(3)
    assert float(log_mean_weight(densities, 1, 3, 2)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "micro_batch", "flag"), [(0, 1, "--iw-samples 0"), (-3, 1, "-3"), (1, 0, "--micro")]
)
def test_fewer_than_one_draw_is_refused(samples: int, micro_batch: int, flag: str) -> None:
    model = perturbed(TINY)
    with pytest.raises(ConfigError, match=flag):
        importance_weighted_bound(model, images(TINY, 2), samples, 0, micro_batch)


def evidence_of_one_latent(model: NVAE, x: Tensor) -> Tensor:
    """log integral of p(x|z) p(z) dz over a grid of z: (B,) float64. The prior is what the model's first group has."""
    prior = Normal.from_parameters(torch.zeros(1), torch.zeros(1))
    z = torch.linspace(-8, 8, 1601)
    with torch.no_grad():
        parameters, _ = model.decode(Given([z.view(-1, 1, 1, 1)]), batch=len(z))
        likelihood = torch.stack([model.likelihood.log_prob(parameters, row.expand(len(z), -1, -1, -1)) for row in x])
    return (likelihood.double() + prior.log_density(z).double()).logsumexp(1) + math.log(0.01)


def test_bound_of_a_network_with_one_latent_is_its_integrated_evidence() -> None:
    model, x = perturbed(ONE_LATENT), images(ONE_LATENT, 3)
    assert model.latent_shapes == [(1, 1, 1)]
    exact = evidence_of_one_latent(model, x)
    bound = importance_weighted_bound(model, x, samples=3000, seed=0, micro_batch=500)
    assert torch.allclose(bound, exact, rtol=0, atol=0.02)
    elbo = elbo_of_images(model, x.repeat_interleave(200, 0), seed=0)
    mean_elbo = -(elbo.nll + elbo.kl.sum(1)).view(3, 200).mean(1)
    assert bool((mean_elbo < bound).all())
    assert float((bound - mean_elbo).max()) > 0.03  # the bound is tighter by more than the test lets it be off


@pytest.mark.parametrize("flows", [0, 1])
def test_one_draw_has_the_mean_of_the_elbo_and_more_draws_are_not_below_it(flows: int) -> None:
    model_config = replace(TINY, flows=flows)
    model, x = perturbed(model_config), images(model_config, 1).expand(400, -1, -1, -1)
    elbo = elbo_of_images(model, x, seed=0)
    mean, error = Mean.of(-(elbo.nll + elbo.kl.sum(1)))
    one = Mean.of(importance_weighted_bound(model, x, 1, seed=1, micro_batch=200))
    ten = Mean.of(importance_weighted_bound(model, x[:40], 10, seed=1, micro_batch=200))
    assert abs(one.value - mean) < 4 * math.hypot(one.standard_error, error)
    assert ten.value > mean - 2 * math.hypot(ten.standard_error, error)


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_a_draw_depends_on_image_and_number_only(micro_batch: int) -> None:
    model, x = perturbed(TINY), images(TINY, 5)
    whole = importance_weighted_bound(model, x, 6, seed=3, micro_batch=30)
    assert torch.allclose(importance_weighted_bound(model, x, 6, 3, micro_batch), whole, rtol=0, atol=1e-4)
    later = importance_weighted_bound(model, x[2:], 6, 3, micro_batch, first_image=2)
    assert torch.allclose(later, whole[2:], rtol=0, atol=1e-4)
    assert not torch.allclose(importance_weighted_bound(model, x, 6, 4, micro_batch), whole, rtol=0, atol=1e-4)


def test_bf16_activations_leave_the_bound_close() -> None:
    model, x = perturbed(TINY), images(TINY, 4)
    full, half = (importance_weighted_bound(model, x, 20, 0, 40, precision) for precision in ("fp32", "bf16"))
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, rtol=0.05)


# --- the ELBO ---------------------------------------------------------------------------------------------------------


def test_elbo_is_the_one_that_training_reports() -> None:
    model, x = perturbed(TINY), images(TINY, 6)
    figures, pictures = evaluate.measure_likelihood(model, x.split(4), draws=2, micro_batch=4, seed=7)
    reported = validate(model, x.split(2), seed=7)
    assert figures.nelbo.value == pytest.approx(reported.nelbo, rel=1e-5)
    assert figures.kl_of_groups == pytest.approx(reported.kl, rel=1e-5)
    assert [n / TINY.latents for n in figures.active_of_groups] == pytest.approx(reported.active)
    assert figures.nll.value + figures.kl.value == pytest.approx(figures.nelbo.value)
    assert (figures.images, figures.draws) == (6, 2)
    shown = without_padding(x, model.config)
    assert torch.equal(pictures["held-out images"], shown)
    error = (pictures["their reconstructions"] - shown).square().mean()
    assert figures.squared_error.value == pytest.approx(float(error), rel=1e-5)


def test_evaluating_leaves_the_model_as_it_was() -> None:
    model = perturbed(TINY).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate.measure_likelihood(model, images(TINY, 2).split(1), draws=2, micro_batch=2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_the_first_images_are_kept_as_pictures() -> None:
    x = images(TINY, evaluate.SHOWN_IMAGES + 9)
    _, pictures = evaluate.measure_likelihood(perturbed(TINY), x.split(10), draws=1, micro_batch=10)
    assert [len(p) for p in pictures.values()] == [evaluate.SHOWN_IMAGES] * 2


def test_a_diverged_model_is_named_as_such() -> None:
    model = perturbed(TINY)
    with torch.no_grad():
        next(model.blocks["head"].parameters()).fill_(math.nan)
    with pytest.raises(ConfigError, match="not finite"):
        evaluate.measure_likelihood(model, [images(TINY, 2)], draws=1, micro_batch=2)
