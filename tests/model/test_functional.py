"""Convolution units against plain autograd built from torch.nn.functional: gradients, regularisers, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import (
    assert_gradcheck,
    assert_same_values_and_gradients,
    normals,
    plain_regulariser,
    plain_unit,
    plain_weight,
    saved_storages,
    scrambled,
    set_recompute,
    with_both_keeps,
)
from torch import Tensor, nn

from nvae_lowmem.model.flows import causal_mask
from nvae_lowmem.model.functional import effective_weight, recomputation
from nvae_lowmem.model.layers import ConvUnit, NormLayer, ResidualTail, run_units

IN, OUT, SIZE = 4, 6, 5  # channels and pixels per side of most units here
UNITS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel": 1},
    "bare": {"kernel": 3, "bias": False, "weight_norm": False},
    "swish": {"kernel": 3, "activation": "swish"},
    "elu": {"kernel": 1, "activation": "elu"},
    "elu_elu": {"kernel": 1, "activation": "elu_elu"},
    "norm": {"kernel": 1, "norm": True, "weight_norm": False, "bias": False},
    "norm_swish": {"kernel": 3, "norm": True, "activation": "swish"},
    "norm_elu": {"kernel": 3, "norm": True, "activation": "elu", "bias": False},
    "stride": {"kernel": 3, "norm": True, "activation": "swish", "stride": 2},
    "dilation": {"kernel": 3, "norm": True, "activation": "swish", "dilation": 2},
    "upsample": {"kernel": 3, "norm": True, "activation": "swish", "upsample": True},
    "depthwise": {"kernel": 5, "norm": True, "activation": "swish", "groups": IN, "out_channels": IN},
    "groups": {"kernel": 3, "activation": "elu", "groups": 2, "stride": 2},
    "mask": {"kernel": 3, "mask": causal_mask(8, IN, 3, 1, True, False), "out_channels": 8, "bias": False},
    "mask_only": {"kernel": 3, "mask": causal_mask(8, IN, 3, 1, False, True), "out_channels": 8, "weight_norm": False},
}  # fmt: skip
every_unit = pytest.mark.parametrize("name", UNITS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def new_unit(name: str, **changes: Any) -> Any:
    return ConvUnit(**{"in_channels": IN, "out_channels": OUT} | UNITS[name] | changes)


def make_unit(name: str, seed: int = 0, **changes: Any) -> Any:
    return scrambled(new_unit(name, **changes), seed)


# --- the same mathematics, written with torch.nn.functional -----------------------------------------------------------


# --- units ------------------------------------------------------------------------------------------------------------


@with_both_keeps
@in_both_modes
@every_unit
def test_unit_equals_plain_autograd(name: str, training: bool, recompute: bool) -> None:
    unit = make_unit(name).train(training)
    set_recompute(unit, recompute)
    assert_same_values_and_gradients(unit, lambda x: plain_unit(unit, x), normals(2, IN, SIZE, SIZE))


@with_both_keeps
@in_both_modes
@every_unit
def test_unit_gradient_matches_finite_differences(name: str, training: bool, recompute: bool) -> None:
    unit = make_unit(name).train(training)
    set_recompute(unit, recompute)
    assert_gradcheck(unit, normals(2, IN, SIZE, SIZE))


@in_both_modes
def test_every_entry_of_bn_swishs_gradient_matches_finite_differences(training: bool) -> None:
    unit = make_unit("norm_swish", in_channels=2, out_channels=3, kernel=1).train(training)
    set_recompute(unit, True)
    assert_gradcheck(unit, normals(2, 2, 3, 3), fast=False)


class Branch(nn.Module):
    """Several units as one node."""

    def __init__(self, units: list[ConvUnit]) -> None:
        super().__init__()
        self.units: Any = nn.ModuleList(units)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        return run_units(tuple(self.units), x, save_conv_inputs=not self.recompute)


CHAINS = {
    "inverted": ("norm", "depthwise", "norm_swish"),
    "resampled": ("upsample", "norm_swish", "stride"),
    "without_norm": ("groups", "elu", "elu_elu"),
}


@with_both_keeps
@in_both_modes
@pytest.mark.parametrize("chain", CHAINS)
def test_chain_equals_its_units_in_plain_autograd(chain: str, training: bool, recompute: bool) -> None:
    units = [make_unit(name, seed, out_channels=IN) for seed, name in enumerate(CHAINS[chain])]
    branch = Branch(units).train(training)
    branch.recompute = recompute

    def plain(x: Tensor) -> Tensor:
        for unit in units:
            x = plain_unit(unit, x)
        return x

    assert_same_values_and_gradients(branch, plain, normals(2, IN, SIZE, SIZE))
    assert_gradcheck(branch, normals(2, IN, 3, 3))


def test_weights_get_their_gradient_when_the_input_needs_none() -> None:
    unit = make_unit("norm_swish")
    x, parameters = normals(2, IN, SIZE, SIZE), list(unit.parameters())
    expected = torch.autograd.grad(plain_unit(unit, x).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(unit(x).sum(), parameters), expected)


def test_an_output_channel_masked_to_zero_has_finite_gradients() -> None:
    unit = make_unit("1x1", out_channels=4, mask=causal_mask(4, IN, 1, 1, True, False))  # strict: 0 sees nothing
    assert not unit.mask[0].any()
    assert_same_values_and_gradients(unit, lambda x: plain_unit(unit, x), normals(2, IN, SIZE, SIZE))


@pytest.mark.parametrize("name", ["1x1", "mask", "groups", "norm_swish"])
def test_weight_normalisation_follows_its_formula_from_the_first_step(name: str) -> None:
    unit = new_unit(name)
    v = unit.weight.detach() * (1 if unit.mask is None else unit.mask)
    norms = v.flatten(1).square().sum(1).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(unit.log_norm.detach(), torch.log(norms + 1e-2))
    expected = (norms + 1e-2) / (norms + 1e-5) * v
    torch.testing.assert_close(effective_weight(unit.weight, unit.log_norm, unit.mask).detach(), expected)


@pytest.mark.parametrize("momentum", [0.05, 0.2])
def test_running_statistics_move_as_those_of_batchnorm2d(momentum: float) -> None:
    unit, tail = new_unit("norm"), ResidualTail(IN, norm=True, squeeze_excitation=False)
    reference = nn.BatchNorm2d(IN, eps=1e-5, momentum=momentum)
    assert unit.settings.momentum == tail.settings.momentum == 0.05
    unit.settings.momentum = tail.settings.momentum = momentum
    for seed in range(3):
        x = 3 * normals(2, IN, SIZE, SIZE, seed=seed, dtype=torch.float32) + 1
        unit(x), tail(x, x), reference(x)
    for layer in (unit, tail):
        torch.testing.assert_close(layer.running_mean, reference.running_mean)
        torch.testing.assert_close(layer.running_variance, reference.running_var)
    torch.testing.assert_close(tail.eval()(torch.zeros_like(x), x), 0.1 * reference.eval()(x))


# --- regularisers: gradients that appear without a loss ---------------------------------------------------------------


def added_gradients(module: nn.Module, coefficient: float, *inputs: Tensor) -> list[Tensor]:
    """What the coefficient adds to the gradient of every parameter."""
    grads = []
    for value in (coefficient, 0.0):
        for layer in module.modules():
            if isinstance(layer, NormLayer):
                layer.settings.coefficient = value
        grads.append(torch.autograd.grad(module(*inputs).sum(), list(module.parameters())))
    return [a - b for a, b in zip(*grads, strict=True)]


@with_both_keeps
@every_unit
def test_the_regularisers_gradient_is_that_of_autograd(name: str, recompute: bool) -> None:
    unit = make_unit(name, seed=3)
    set_recompute(unit, recompute)
    if unit.gamma is not None:
        unit.gamma.data[1] = -2.0  # the largest magnitude is a negative one
    parameters = list(unit.parameters())
    expected = torch.autograd.grad(plain_regulariser(unit), parameters, allow_unused=True, materialize_grads=True)
    for added, wanted in zip(added_gradients(unit, 0.37, normals(2, IN, SIZE, SIZE)), expected, strict=True):
        torch.testing.assert_close(added, 0.37 * wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["norm_swish", "mask"])
def test_the_regularisers_gradient_is_that_of_finite_differences(name: str) -> None:
    unit, step = make_unit(name, seed=4), 1e-6
    added = added_gradients(unit, 2.0, normals(2, IN, SIZE, SIZE))
    for parameter, gradient in zip(unit.parameters(), added, strict=True):
        flat, numeric = parameter.data.view(-1), torch.zeros_like(parameter).view(-1)
        for i, value in enumerate(flat.tolist()):
            ends = []
            for moved in (value + step, value - step):
                flat[i] = moved
                ends.append(plain_regulariser(unit).item())
            flat[i] = value
            numeric[i] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(gradient.view(-1), 2.0 * numeric, rtol=1e-6, atol=1e-8)


@every_unit
def test_power_iteration_finds_the_spectral_norm_and_its_gradient(name: str) -> None:
    unit = make_unit(name, seed=5)
    unit.settings.iterations, x = 500, normals(2, IN, SIZE, SIZE)
    unit(x)
    unit.settings.iterations = 0
    largest = torch.linalg.svdvals(plain_weight(unit).flatten(1))[0]
    torch.testing.assert_close(unit.sigma, largest.detach(), rtol=1e-6, atol=0.0)
    (expected,) = torch.autograd.grad(largest, [unit.weight])
    added = dict(zip(dict(unit.named_parameters()), added_gradients(unit, 1.0, x), strict=True))
    torch.testing.assert_close(added["weight"], expected, rtol=1e-4, atol=1e-4)


def test_power_iteration_runs_in_training_when_due_and_not_in_a_recomputation() -> None:
    unit, x = make_unit("norm_swish"), normals(2, IN, SIZE, SIZE)

    def moves() -> bool:
        before = [t.clone() for t in (unit.u, unit.v, unit.sigma)]
        unit(x)
        changed = {not torch.equal(a, b) for a, b in zip(before, (unit.u, unit.v, unit.sigma), strict=True)}
        assert len(changed) == 1  # all of them or none
        return changed.pop()

    assert not moves()  # none due
    unit.settings.iterations = 1
    assert moves()
    with recomputation():
        assert not moves()
    assert not unit.eval().training and not moves()


def test_power_iteration_goes_on_from_where_the_last_step_left_it() -> None:
    once, twice, x = make_unit("swish"), make_unit("swish"), normals(2, IN, SIZE, SIZE)
    twice.u.copy_(once.u), twice.v.copy_(once.v)
    once.settings.iterations, twice.settings.iterations = 4, 2
    once(x), twice(x), twice(x)
    assert torch.equal(once.u, twice.u) and torch.equal(once.v, twice.v) and torch.equal(once.sigma, twice.sigma)


# --- what stays in memory until the backward pass ---------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
def test_cheap_bn_swish_saves_its_input_and_three_statistics_per_channel(recompute: bool) -> None:
    unit = make_unit("norm_swish").float()
    set_recompute(unit, recompute)
    x = normals(2, IN, 8, 8, dtype=torch.float32).requires_grad_()
    saved = saved_storages(unit, x)
    assert x.untyped_storage().data_ptr() in saved
    copies = 1 if recompute else 2  # else also what the convolution read
    assert sum(t.untyped_storage().nbytes() for t in saved.values()) == copies * x.nbytes + 3 * IN * 4
