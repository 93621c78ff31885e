"""Latents: normals and their KL, noise by sample slot, and the one top-down pass with every source."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    VARIANTS,
    build,
    images,
    loss_of,
    normals,
    set_recompute,
    tiny_rgb,
)
from torch import Tensor

from nvae_lowmem.model.functional import recomputation
from nvae_lowmem.model.latents import FromPosterior, FromPrior, Given, NoNoise, Normal, SeededNoise, Source
from nvae_lowmem.model.nvae import NVAE

CPU = torch.device("cpu")
numbers = st.floats(-20.0, 20.0, allow_nan=False)
unhurried = settings(max_examples=50, deadline=None)  # a busy machine is no failure
raw = st.tuples(numbers, numbers)  # mu and log sigma as the network gives them


def a_normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Normal:
    return Normal.from_parameters(scale * normals(*shape, seed=seed), scale * normals(*shape, seed=seed + 100))


def a_single_normal(parameters: tuple[float, float]) -> Normal:
    return Normal.from_parameters(*torch.tensor(parameters, dtype=torch.float64))


# --- normals ----------------------------------------------------------------------------------------------------------


@given(raw)
@unhurried
def test_parameters_go_through_the_soft_clamp_and_sigma_has_a_floor(parameters: tuple[float, float]) -> None:
    mu, sigma = (t.item() for t in a_single_normal(parameters))
    assert mu == pytest.approx(5 * math.tanh(parameters[0] / 5), abs=1e-12)
    assert sigma == pytest.approx(math.exp(5 * math.tanh(parameters[1] / 5)) + 0.01, rel=1e-12)


@given(raw, raw)
@unhurried
def test_kl_is_that_of_torch_distributions_and_never_negative(a: tuple[float, float], b: tuple[float, float]) -> None:
    q, p = a_single_normal(a), a_single_normal(b)
    kl = q.divergence(p)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(*q), torch.distributions.Normal(*p))
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-12)
    assert kl >= -1e-12 and q.divergence(q).abs() < 1e-12


@given(raw, numbers)
@unhurried
def test_log_density_is_that_of_torch_distributions(parameters: tuple[float, float], z: float) -> None:
    normal, value = a_single_normal(parameters), torch.tensor(z, dtype=torch.float64)
    expected = torch.distributions.Normal(*normal).log_prob(value)
    torch.testing.assert_close(normal.log_density(value), expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_kl_and_log_density_match_finite_differences() -> None:
    raws = [3 * normals(1, 2, 2, 1, seed=s).requires_grad_() for s in range(4)]
    z = normals(1, 2, 2, 1, seed=9).requires_grad_()

    def kl_and_densities(a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        q, p = Normal.from_parameters(a, b), Normal.from_parameters(c, d)
        return q.divergence(p), q.log_density(z) - p.log_density(z)

    assert torch.autograd.gradcheck(kl_and_densities, (*raws, z))


def test_temperature_multiplies_sigma() -> None:
    normal, eps = a_normal(2, 3, 4, 4), normals(2, 3, 4, 4, seed=3)
    for temperature in (0.0, 0.6, 1.0):
        torch.testing.assert_close(normal.draw(eps, temperature), normal.mu + temperature * normal.sigma * eps)


# --- noise ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**31), slot=st.integers(0, 2**20), group=st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_noise_is_a_function_of_the_samples_slot(seed: int, step: int, slot: int, group: int) -> None:
    noise = SeededNoise(seed, step, slot)
    whole = noise.normal(group, (4, 2, 3, 3), CPU)
    parts = [noise.normal(group, (2, 2, 3, 3), CPU), noise.at(slot + 2).normal(group, (2, 2, 3, 3), CPU)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[3:], SeededNoise(seed, step, first_slot=slot + 3).normal(group, (1, 2, 3, 3), CPU))


def test_seed_step_slot_and_group_each_change_the_noise() -> None:
    draws = [
        SeededNoise(seed, step, slot).normal(group, (1, 1, 1, 2), CPU)
        for seed in range(3) for step in range(3) for slot in range(3) for group in range(3)
    ]  # fmt: skip
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 3**4


def test_noise_is_standard_normal_over_slots_groups_and_steps() -> None:
    for axis in ("slot", "group", "step"):
        if axis == "slot":
            eps = SeededNoise(5).normal(0, (2000, 1, 1, 2), CPU)
        elif axis == "group":
            eps = torch.cat([SeededNoise(5).normal(i, (1, 1, 1, 2), CPU) for i in range(2000)])
        else:
            eps = torch.cat([SeededNoise(5, i).normal(0, (1, 1, 1, 2), CPU) for i in range(2000)])
        values = eps.double().view(2000, 2)
        assert values.mean().abs() < 4 / math.sqrt(4000)
        assert (values.square().mean() - 1).abs() < 4 * math.sqrt(2 / 4000)
        neighbours = (values[1:] * values[:-1]).mean(0)
        assert (neighbours.abs() < 4 / math.sqrt(2000)).all()


def test_noise_is_fp32_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assert SeededNoise(1).normal(0, (2, 3, 4, 4), CPU).dtype == torch.float32
    assert not NoNoise().normal(0, (2, 3, 4, 4), CPU).any()
    assert torch.equal(before, torch.get_rng_state())


# --- sources ----------------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 4, 4)


def test_without_flows_the_posterior_gives_the_analytic_kl_per_image_and_channel() -> None:
    q, p, noise = a_normal(*SHAPE), a_normal(*SHAPE, seed=1), SeededNoise(3)
    latent = FromPosterior(noise).latent(0, p, q, None)
    assert latent.z is not None and latent.kl is not None and latent.log_q is latent.log_p is None
    torch.testing.assert_close(latent.z, q.draw(noise.normal(0, SHAPE, CPU)))
    torch.testing.assert_close(latent.kl, q.divergence(p).sum((2, 3)))
    with_densities = FromPosterior(noise, densities=True).latent(0, p, q, None)
    torch.testing.assert_close(with_densities.kl, latent.kl)
    torch.testing.assert_close(with_densities.log_q, q.log_density(latent.z).sum((1, 2, 3)))
    torch.testing.assert_close(with_densities.log_p, p.log_density(latent.z).sum((1, 2, 3)))


def test_with_flows_q_is_taken_before_and_p_after_the_flow() -> None:
    q, p, noise = a_normal(*SHAPE), a_normal(*SHAPE, seed=1), SeededNoise(3)
    z0 = q.draw(noise.normal(0, SHAPE, CPU))
    latent = FromPosterior(noise).latent(0, p, q, lambda z: z + 0.5)
    torch.testing.assert_close(latent.z, z0 + 0.5)
    torch.testing.assert_close(latent.kl, (q.log_density(z0) - p.log_density(z0 + 0.5)).sum((2, 3)))
    assert latent.kl is not None and latent.log_q is not None and latent.log_p is not None
    torch.testing.assert_close(latent.kl.sum(1), latent.log_q - latent.log_p)


def test_the_prior_takes_one_temperature_or_one_per_group() -> None:
    p, noise = a_normal(*SHAPE), SeededNoise(3)
    per_group = FromPrior(noise, [0.3, 0.9])
    for group, temperature in enumerate((0.3, 0.9)):
        expected = p.mu + temperature * p.sigma * noise.normal(group, SHAPE, CPU)
        torch.testing.assert_close(per_group.latent(group, p, None, None).z, expected)
        torch.testing.assert_close(FromPrior(noise, temperature).latent(group, p, None, None).z, expected)


# --- one top-down pass ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> NVAE:
    """A network with flows in eval mode, its BatchNorm statistics those of a few passes."""
    config = tiny_rgb()
    model = build(config)
    with torch.no_grad():
        for step in range(20):
            model(images(config, 4, seed=step), SeededNoise(0, step))
    return model.eval()


def decoded(
    model: NVAE, source: Source, maps: list[Tensor] | None = None, batch: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """(parameters of the likelihood, z of every group)."""
    with torch.no_grad():
        parameters, latents = model.decode(source, maps, batch, return_z=True)
    return parameters, [latent.z for latent in latents if latent.z is not None]


@pytest.mark.parametrize("name", ["as_it_is", "no_flows", "1_bit_padded", "vanilla", "three_scales"])
def test_given_the_posteriors_latents_the_pass_gives_the_posteriors_reconstruction(name: str, model: NVAE) -> None:
    if name != "as_it_is":
        model = build(tiny_rgb(**VARIANTS[name])).eval()
    config = model.config
    with torch.no_grad():
        maps = model.encode(images(config, 3))
        features, latents = model.top_down(FromPosterior(SeededNoise(2)), [*maps], return_z=True)
        z = [latent.z for latent in latents if latent.z is not None]
        again, _ = model.top_down(Given(z), batch=3)
    assert [tuple(t.shape) for t in z] == [(3, *shape) for shape in model.latent_shapes]
    assert torch.equal(features, again)
    parameters, _ = decoded(model, FromPosterior(SeededNoise(2)), maps)
    assert torch.equal(parameters, decoded(model, Given(z), batch=3)[0])
    assert parameters.shape == (3, model.likelihood.parameter_channels, config.image_size, config.image_size)


def test_latents_are_kept_only_where_asked_for(model: NVAE) -> None:
    _, latents = model.top_down(FromPrior(SeededNoise(0)))
    assert all(latent.z is None for latent in latents)


def test_no_noise_is_deterministic_and_the_same_as_temperature_zero(model: NVAE) -> None:
    means, z = decoded(model, FromPrior(NoNoise()), batch=2)
    assert torch.equal(means, decoded(model, FromPrior(NoNoise(), 0.7), batch=2)[0])
    assert torch.equal(means, decoded(model, FromPrior(SeededNoise(4), 0.0), batch=2)[0])
    assert not z[0].any()  # the top group's prior is N(0, I)
    assert not torch.equal(means, decoded(model, FromPrior(SeededNoise(4), 0.5), batch=2)[0])


def test_a_pass_is_a_function_of_its_noise_and_draws_nothing_itself(model: NVAE) -> None:
    x = images(model.config)
    before = torch.get_rng_state()
    first, second, other = (model(x, SeededNoise(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.nll, second.nll) and not torch.equal(first.nll, other.nll)


@pytest.mark.parametrize("source", [FromPosterior(SeededNoise(6)), FromPosterior(SeededNoise(6), densities=True)])
def test_micro_batches_give_the_terms_of_the_whole_batch(source: FromPosterior, model: NVAE) -> None:
    x = images(model.config, 4)
    assert isinstance(source.noise, SeededNoise)
    with torch.no_grad():
        whole = model.elbo_terms(x, source)
        halves = [model.elbo_terms(x[i : i + 2], FromPosterior(source.noise.at(i), source.densities)) for i in (0, 2)]
    torch.testing.assert_close(torch.cat([h.nll for h in halves]), whole.nll, rtol=1e-5, atol=1e-3)
    for name in ("kl", "log_q", "log_p"):
        for a, b, both in zip(*(getattr(h, name) for h in halves), getattr(whole, name), strict=True):
            torch.testing.assert_close(torch.cat([a, b]), both, rtol=1e-4, atol=1e-3)


def test_the_generated_batch_is_the_same_in_parts(model: NVAE) -> None:
    whole, _ = decoded(model, FromPrior(SeededNoise(8), 0.8), batch=4)
    parts = [decoded(model, FromPrior(SeededNoise(8, first_slot=i), 0.8), batch=2)[0] for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_every_groups_latent_reaches_the_output(model: NVAE) -> None:
    _, z = decoded(model, FromPrior(SeededNoise(0)))
    leaves = [t.requires_grad_() for t in z]
    grads = torch.autograd.grad(model.decode(Given(leaves))[0].square().sum(), leaves)
    assert all(g.abs().amax((0, 2, 3)).all() for g in grads)  # and every channel of it


def test_changing_the_image_changes_nothing_that_the_prior_decides(model: NVAE) -> None:
    """The state after the first combiner depends on x only through z, so the prior's pass ignores the maps."""
    a, b = (model.encode(images(model.config, 2, seed)) for seed in (0, 1))
    samples = [decoded(model, FromPrior(SeededNoise(3)), maps)[0] for maps in (a, b)]
    assert torch.equal(*samples)


@pytest.mark.parametrize("residual", [True, False])
def test_a_residual_posterior_that_says_nothing_is_the_prior(residual: bool) -> None:
    config = tiny_rgb(flows=0, residual_posterior=residual)
    model = build(config)
    for name, parameter in model.named_parameters():
        if ".posterior." in name and name.endswith(("bias", "log_norm")):
            parameter.data.fill_(-100.0 if name.endswith("log_norm") else 0.0)
    kl = model(images(config), SeededNoise(0)).kl
    silent = [bool((group.abs() < 1e-4).all()) for group in kl[1:]]
    assert silent == [residual] * 3


def test_the_cheap_network_has_the_same_gradient() -> None:
    config = tiny_rgb()
    model, grads = build(config).double(), []
    for recompute in (False, True):
        set_recompute(model, recompute)
        loss = loss_of(model(images(config).double(), SeededNoise(0)))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert (grads[0] - grads[1]).norm() <= 1e-9 * grads[0].norm()


def test_a_recomputation_of_the_network_moves_nothing() -> None:
    config = tiny_rgb()
    model, x = build(config), images(config)
    model.settings.iterations = 3
    first = model(x, SeededNoise(0))
    before = {k: v.clone() for k, v in model.named_buffers()}
    with recomputation():
        second = model(x, SeededNoise(0))
    torch.testing.assert_close(loss_of(second), loss_of(first), rtol=0.0, atol=0.0)
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    model(x, SeededNoise(0))
    still = [k for k, v in model.named_buffers() if torch.equal(before[k], v)]
    assert all(k.endswith((".mask", ".u", ".v", ".sigma")) for k in still)
