"""The network: cells against plain autograd, exact sizes, every architecture, blocks, half precision."""

from __future__ import annotations

import math
import typing
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model_functional import (
    assert_gradcheck,
    assert_same_values_and_gradients,
    normals,
    plain_norm,
    plain_regulariser,
    plain_unit,
    plain_weight,
    saved_storages,
    scrambled,
    set_recompute,
    with_both_keeps,
)
from torch import Tensor, nn

from nvae_lowmem.config import Architecture, ModelConfig
from nvae_lowmem.model.cells import CELLS, Cell, Inverted, Kind, Resample, Residual, Side, make_cell
from nvae_lowmem.model.functional import recomputation
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.layers import ConvUnit, DownSkip, ResidualTail, UpSkip
from nvae_lowmem.model.nvae import NVAE, ElboTerms
from nvae_lowmem.recipes import recipe


def tiny_rgb(**changes: Any) -> ModelConfig:
    """RGB, two scales of two groups, with flows: everything the network has, as small as it gets."""
    base = ModelConfig(
        image_channels=3, image_size=16, bits=8, mixtures=2, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
        adaptive=False, latents=3, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=2,
        postprocess_blocks=1, postprocess_cells=2, flows=1,
    )  # fmt: skip
    config = replace(base, **changes)
    assert not config.problems()
    return config


def build(config: ModelConfig, seed: int = 0) -> NVAE:
    torch.manual_seed(seed)
    return NVAE(config)


def images(config: ModelConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """(B, channels, S, S) in [0,1] on the grid of the configuration's bits."""
    shape, top = (batch, config.image_channels, config.network_size, config.network_size), 2**config.bits - 1
    return torch.randint(0, top + 1, shape, generator=torch.Generator().manual_seed(seed)) / top


def loss_of(terms: ElboTerms) -> Tensor:
    return (terms.nll + sum(kl.sum(1) for kl in terms.kl)).mean()


# --- tails, skips, cells ----------------------------------------------------------------------------------------------


def plain_tail(tail: ResidualTail, skip: Tensor, c: Tensor) -> Tensor:
    y = plain_norm(tail, c)
    if tail.squeeze_weight is not None:
        hidden = F.relu(F.linear(y.mean((2, 3)), tail.squeeze_weight, tail.squeeze_bias))
        y = y * torch.sigmoid(F.linear(hidden, tail.excite_weight, tail.excite_bias))[:, :, None, None]
    return skip + 0.1 * y


def plain_skip(skip: nn.Module, x: Tensor) -> Tensor:
    if isinstance(skip, DownSkip):
        s, parts = F.silu(x), typing.cast("list[ConvUnit]", list(skip.parts))
        corners = s, s[:, :, 1:, 1:], s[:, :, :, 1:], s[:, :, 1:, :]
        maps = [F.conv2d(c, plain_weight(p), p.bias, stride=2) for c, p in zip(corners, parts, strict=True)]
        return torch.cat(maps, dim=1)
    if isinstance(skip, UpSkip):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.conv2d(x, plain_weight(skip.project))
    return x


def plain_cell(cell: Cell, kind: Kind, x: Tensor) -> Tensor:
    c = x
    if isinstance(kind, Inverted) and isinstance(cell.skip, UpSkip):
        c = F.interpolate(x, scale_factor=2, mode="nearest")
    for unit in cell.units:
        c = plain_unit(typing.cast(ConvUnit, unit), c)
    return plain_tail(cell.tail, plain_skip(cell.skip, x), c)


@with_both_keeps
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("se", [True, False], ids=["se", "no_se"])
@pytest.mark.parametrize("norm", [True, False], ids=["bn", "no_bn"])
def test_tail_equals_plain_autograd_and_finite_differences(
    norm: bool, se: bool, training: bool, recompute: bool
) -> None:
    tail = scrambled(ResidualTail(4, norm=norm, squeeze_excitation=se)).train(training)
    set_recompute(tail, recompute)
    skip, c = normals(2, 4, 3, 3), normals(2, 4, 3, 3, seed=2)
    assert_same_values_and_gradients(tail, lambda s, c: plain_tail(tail, s, c), skip, c)
    assert_gradcheck(tail, skip, c)


@pytest.mark.parametrize(("channels", "hidden"), [(16, 4), (128, 8)])
def test_squeeze_excitation_has_a_sixteenth_of_the_channels_but_four(channels: int, hidden: int) -> None:
    tail = ResidualTail(channels, norm=False, squeeze_excitation=True)
    shapes = {name: tuple(p.shape) for name, p in tail.named_parameters() if name.endswith("weight")}
    assert shapes == {"squeeze_weight": (hidden, channels), "excite_weight": (channels, hidden)}


@with_both_keeps
@pytest.mark.parametrize("resample", ["keep", "down", "up"])
@pytest.mark.parametrize(
    ("architecture", "side"), [("res_mbconv", "encoder"), ("res_elu", "decoder"), ("res_mbconv", "postprocess")]
)
def test_cell_equals_plain_autograd(
    architecture: Architecture, side: Side, resample: Resample, recompute: bool
) -> None:
    out, size = {"keep": (4, 6), "down": (10, 3), "up": (2, 12)}[resample]
    cell = scrambled(make_cell(architecture, side, 4, out, resample))
    set_recompute(cell, recompute)
    x = normals(2, 4, 6, 6)
    assert cell(x).shape == (2, out, size, size)
    kind = CELLS[architecture][side]
    assert_same_values_and_gradients(cell, lambda x: plain_cell(cell, kind, x), x, rtol=1e-8, atol=1e-10)


# name: encoder tower, pre-process, decoder tower, post-process, as published; a residual cell by (norm, activation,
# dilations), an inverted residual by (expand, kernel, groups of its middle convolution or "depthwise")
RES, E6, E3 = (True, "swish", (1, 1)), (6, 5, "depthwise"), (3, 5, "depthwise")
E6K11, E3G8 = (6, 11, "depthwise"), (3, 5, 8)
PUBLISHED: dict[str, tuple[Any, Any, Any, Any]] = {
    "res_elu": ((False, "elu", (1, 1)),) * 4,
    "res_bnelu": ((True, "elu", (1, 1)),) * 4,
    "res_bnswish": (RES,) * 4,
    "res_mbconv": (RES, RES, E6, E3),
    "res53_mbconv": ((True, "swish", (2, 1)), (True, "swish", (2, 1)), E6, E3),
    "res35_mbconv": ((True, "swish", (1, 2)), (True, "swish", (1, 2)), E6, E3),
    "res55_mbconv": ((True, "swish", (2, 2)), (True, "swish", (2, 2)), E6, E3),
    "mbconv_sep": (E6, E3, E6, E3),
    "mbconv_sep11": (E6K11, E3, E6K11, E3),
    "mbconv_res": (E6, E3, RES, RES),
    "mbconv_den": (E6, E3G8, E6, E3G8),
}
SIDES: tuple[Side, ...] = ("encoder", "preprocess", "decoder", "postprocess")


def describe(cell: Cell) -> tuple[Any, ...]:
    """What a cell's convolutions turn out to be, in the terms of PUBLISHED."""
    units = typing.cast("list[ConvUnit]", list(cell.units))
    if len(units) == 2:
        assert {(u.weight.shape[-1], u.groups, u.bias is None, u.log_norm is None) for u in units} == {
            (3, 1, False, False)
        }
        assert cell.tail.gamma is None
        (kind,) = {(u.gamma is not None, u.activation) for u in units}
        return (*kind, (units[0].dilation, units[1].dilation))
    assert [u.activation for u in units] == ["none", "swish", "swish"] and cell.tail.gamma is not None
    assert all(u.gamma is not None and u.bias is None and u.log_norm is None for u in units)
    assert [u.weight.shape[-1] for u in (units[0], units[2])] == [1, 1]
    middle, wide = units[1], units[0].weight.shape[0]
    groups = "depthwise" if middle.groups == wide else middle.groups
    return wide // units[0].weight.shape[1], middle.weight.shape[-1], groups


@pytest.mark.parametrize("architecture", CELLS)
def test_cells_are_those_of_the_published_table(architecture: Architecture) -> None:
    for side, expected in zip(SIDES, PUBLISHED[architecture], strict=True):
        cell = make_cell(architecture, side, 8, 16, "down")
        assert describe(cell) == expected
        strides = [typing.cast(ConvUnit, unit).stride for unit in cell.units]
        assert strides == ([2, 1] if isinstance(CELLS[architecture][side], Residual) else [1, 2, 1])


def statistics(module: nn.Module) -> list[Tensor]:
    return [v.clone() for k, v in module.named_buffers() if "running" in k]


@pytest.mark.parametrize("architecture", CELLS)
def test_cheap_cells_give_the_same_numbers_and_move_statistics_once(architecture: Architecture) -> None:
    runs: list[tuple[list[Tensor], list[Tensor]]] = []
    for recompute in (False, True):
        cell = scrambled(make_cell(architecture, "decoder", 8, 4, "up"), dtype=torch.float32)
        set_recompute(cell, recompute)
        x = normals(2, 8, 8, 8, dtype=torch.float32).requires_grad_()
        y = cell(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *cell.parameters()])
        runs.append(([y.detach(), *grads], statistics(cell)))
    (numbers, moved), (cheap_numbers, cheap_moved) = runs
    for a, b in zip(numbers, cheap_numbers, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(moved, cheap_moved, strict=True))


@pytest.mark.parametrize(("side", "cheap", "kept"), [("encoder", 3, 5), ("decoder", 8, 28)])
def test_a_cells_maps_in_memory_in_units_of_its_input(side: Side, cheap: int, kept: int) -> None:
    """Two residual units: 1+1+1 or 1+1+1+1+1; expand 6: 1+6+1 or 1+1+6+6+6+6+1+1."""
    cell = make_cell("res_mbconv", side, 8, 8)
    x = normals(2, 8, 8, 8, dtype=torch.float32).requires_grad_()
    for recompute, expected in ((True, cheap), (False, kept)):
        set_recompute(cell, recompute)
        maps = [t for t in saved_storages(cell, x).values() if t.dim() == 4]
        assert sum(t.untyped_storage().nbytes() for t in maps) == expected * x.nbytes


# --- sizes ------------------------------------------------------------------------------------------------------------

CELEBA = recipe("celeba64").model
# fmt: off
EXACT: dict[str, tuple[ModelConfig, int, tuple[int, ...], int]] = {
    "mnist":       (recipe("mnist").model,        33_363_134, (10, 5),          14_400),
    "cifar10":     (recipe("cifar10").model,     130_852_480, (30,),           153_600),
    "celeba64":    (CELEBA,                      153_281_364, (20, 10, 5),     467_200),
    "imagenet32":  (recipe("imagenet32").model,  268_509_444, (28,),           143_360),
    "celebahq256": (recipe("celebahq256").model, 330_798_664, (16, 8, 4, 4, 4), 6_005_760),
    "tiny":        (recipe("tiny").model,            326_826, (3, 3),            7_680),
    "celeba64_not_adaptive": (replace(CELEBA, adaptive=False), 449_563_924, (20, 20, 20), 537_600),
    "celeba64_no_flows":     (replace(CELEBA, flows=0),        151_371_764, (20, 10, 5),  467_200),
    "celeba64_32ch": (replace(CELEBA, channels_encoder=32, channels_decoder=32), 41_306_764, (20, 10, 5), 467_200),
    "celeba64_24ch": (replace(CELEBA, channels_encoder=24, channels_decoder=24), 24_662_188, (20, 10, 5), 467_200),
    "celeba64_16ch": (replace(CELEBA, channels_encoder=16, channels_decoder=16), 12_548_812, (20, 10, 5), 467_200),
}
# fmt: on
BIG = ("celebahq256", "celeba64_not_adaptive")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in BIG else n for n in EXACT])
def test_exact_parameters_groups_and_latent_dimensions(name: str) -> None:
    config, parameters, groups, dimensions = EXACT[name]
    with torch.device("meta"):
        model = NVAE(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.scale_groups == groups and config.latent_dims == dimensions
    assert len(model.latent_shapes) == sum(groups)
    assert sum(math.prod(shape) for shape in model.latent_shapes) == dimensions


def test_both_256_pixel_recipes_are_the_same_network() -> None:
    assert recipe("ffhq256").model == recipe("celebahq256").model


# --- every kind of network --------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"architecture": name} for name in CELLS},
    "2_channels": {"image_channels": 2},
    "5_channels": {"image_channels": 5},
    "1_bit_padded": {"bits": 1, "image_channels": 1, "image_size": 12, "padding": 2},
    "5_bits": {"bits": 5},
    "normal_likelihood": {"mixtures": 1},
    "no_residual_posterior": {"residual_posterior": False},
    "no_squeeze_excitation": {"squeeze_excitation": False},
    "no_flows": {"flows": 0},
    "three_scales": {"scales": 3, "groups_per_scale": (2, 1, 3)},
    "other_widths": {"channels_encoder": 8, "channels_decoder": 16},
    "vanilla": {"scales": 1, "groups": 1, "preprocess_blocks": 2, "postprocess_blocks": 2},
    "vanilla_no_resampling": {
        "scales": 1,
        "groups": 1,
        "preprocess_blocks": 0,
        "postprocess_blocks": 0,
        "image_size": 4,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_runs_forward_and_backward(name: str) -> None:
    config = tiny_rgb(**VARIANTS[name])
    model, x = build(config), images(config)
    terms = model(x, SeededNoise(1))
    assert (
        terms.nll.shape == (2,) and terms.log_q == [] if not config.flows else len(terms.log_q) == config.total_groups
    )
    assert [kl.shape for kl in terms.kl] == [(2, config.latents)] * config.total_groups
    loss_of(terms).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
    maps = [(len(e), *e.shape[2:]) for e in model.encode(x)]
    assert maps == [(2, h, w) for _, h, w in model.latent_shapes]


@pytest.mark.parametrize("residual", [True, False])
def test_a_residual_posterior_that_says_nothing_is_the_prior(residual: bool) -> None:
    config = tiny_rgb(flows=0, residual_posterior=residual)
    model = build(config)
    for name, parameter in model.named_parameters():
        if ".posterior." in name and name.endswith(("bias", "log_norm")):
            parameter.data.fill_(-100.0 if name.endswith("log_norm") else 0.0)
    kl = model(images(config), SeededNoise(0)).kl
    silent = [bool((group.abs() < 1e-6).all()) for group in kl[1:]]
    assert silent == [residual] * 3  # the first group's prior is N(0, I), sigma of its posterior 1.01


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["res_mbconv", "vanilla", "three_scales"])
def test_blocks_run_once_in_the_order_of_their_names_and_hold_every_parameter(name: str) -> None:
    config = tiny_rgb(**VARIANTS[name])
    model = build(config)
    ran: list[str] = []
    for block_name, block in model.blocks.items():
        block.register_forward_hook(lambda *_, block_name=block_name: ran.append(block_name))
    model(images(config), SeededNoise(0))
    assert ran == model.block_names()
    owners = [f"blocks.{block}." for block in model.block_names()]
    for parameter in dict(model.named_parameters()):
        assert sum(parameter.startswith(owner) for owner in owners) == 1, parameter


def test_block_names_read_from_the_image_to_the_image() -> None:
    assert (
        build(tiny_rgb()).block_names()
        == (
            "stem pre_0_0 pre_0_1 enc_0_1 enc_0_0 enc_0_down enc_1_1 enc_1_0 top start "
            "dec_1_0 dec_1_1 dec_1_up dec_0_0 dec_0_1 post_0_0 post_0_1 head"
        ).split()
    )


def test_the_models_coefficient_adds_the_regularisers_gradient_everywhere() -> None:
    config = tiny_rgb()
    model, x = build(config), images(config)
    model(x, SeededNoise(0))
    for layer in model.layers():
        if layer.gamma is not None:
            layer.gamma.data.copy_(1 + 0.1 * torch.randn(layer.gamma.shape))
    parameters = list(model.parameters())
    grads = []
    for coefficient in (0.0, 1e4):  # so large that fp32 resolves it beside the loss's own gradient
        model.regularisation.coefficient = coefficient
        grads.append(torch.autograd.grad(loss_of(model(x, SeededNoise(0))), parameters))
    wanted = torch.autograd.grad(plain_regulariser(model), parameters, allow_unused=True, materialize_grads=True)
    for (name, _), without, with_it, expected in zip(model.named_parameters(), *grads, wanted, strict=True):
        slack = 1e-5 * (without.abs().max() + 1e4 * expected.abs().max())
        assert (with_it - without - 1e4 * expected).abs().max() <= slack + 1e-6, name


# --- half precision ---------------------------------------------------------------------------------------------------


def test_under_bf16_autocast_activations_are_bf16_and_everything_that_sums_is_fp32() -> None:
    config = tiny_rgb()
    model, x = build(config), images(config)
    seen: set[tuple[torch.dtype, bool]] = set()
    for module in model.modules():
        if isinstance(module, Cell | ConvUnit):
            module.register_forward_pre_hook(
                lambda _, inputs: seen.add((inputs[0].dtype, torch.is_autocast_enabled("cpu")))
            )
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(x, SeededNoise(0))
    assert seen == {(torch.bfloat16, False)}  # no autocast list has a say in what runs inside
    assert {t.dtype for t in (terms.nll, *terms.kl, *terms.log_q)} == {torch.float32}
    assert all(t.isfinite().all() for t in (terms.nll, *terms.kl))
    loss_of(terms).backward()
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name
    exact = build(config)(x, SeededNoise(0))
    torch.testing.assert_close(terms.nll, exact.nll, rtol=0.02, atol=0.0)


def test_bf16_gradients_point_where_fp32_gradients_point() -> None:
    config = tiny_rgb(flows=0)
    flat = []
    for enabled in (False, True):
        model = build(config)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(model(images(config, 4), SeededNoise(0)))
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert F.cosine_similarity(flat[0], flat[1], dim=0) > 0.98


def test_a_recomputation_of_the_network_moves_nothing() -> None:
    config = tiny_rgb()
    model, x = build(config), images(config)
    model.regularisation.iterations = 3
    first = model(x, SeededNoise(0))
    before = {k: v.clone() for k, v in model.named_buffers()}
    with recomputation():
        second = model(x, SeededNoise(0))
    torch.testing.assert_close(loss_of(second), loss_of(first), rtol=0.0, atol=0.0)
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    model(x, SeededNoise(0))
    still = [k for k, v in model.named_buffers() if torch.equal(before[k], v)]
    assert all(k.endswith((".mask", ".u", ".v", ".sigma")) for k in still)
