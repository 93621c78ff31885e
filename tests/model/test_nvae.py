"""The network: cells against plain autograd, exact sizes, every architecture, blocks, half precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    VARIANTS,
    assert_gradcheck,
    assert_same_values_and_gradients,
    build,
    images,
    loss_of,
    normals,
    plain_norm,
    plain_regulariser,
    plain_unit,
    plain_weight,
    saved_storages,
    scrambled,
    set_recompute,
    tiny_rgb,
    with_both_keeps,
)
from torch import Tensor, nn

from nvae_lowmem.config.model import Architecture, ModelConfig
from nvae_lowmem.config.recipes import recipe
from nvae_lowmem.model.cells import CELLS, Cell, Resample, Side, make_cell
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.layers import ConvUnit, DownSkip, ResidualTail, UpSkip
from nvae_lowmem.model.nvae import NVAE

# --- tails, skips, cells ----------------------------------------------------------------------------------------------


def plain_tail(tail: Any, skip: Tensor, c: Tensor) -> Tensor:
    y = plain_norm(tail, c)
    if tail.squeeze_weight is not None:
        hidden = F.relu(F.linear(y.mean((2, 3)), tail.squeeze_weight, tail.squeeze_bias))
        y = y * torch.sigmoid(F.linear(hidden, tail.excite_weight, tail.excite_bias))[:, :, None, None]
    return skip + 0.1 * y


def plain_skip(skip: Any, x: Tensor) -> Tensor:
    if isinstance(skip, DownSkip):
        s, parts = F.silu(x), list[Any](skip.parts)
        corners = s, s[:, :, 1:, 1:], s[:, :, :, 1:], s[:, :, 1:, :]
        maps = [F.conv2d(c, plain_weight(p), p.bias, stride=2) for c, p in zip(corners, parts, strict=True)]
        return torch.cat(maps, dim=1)
    if isinstance(skip, UpSkip):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.conv2d(x, plain_weight(skip.project))
    return x


def plain_cell(cell: Any, x: Tensor) -> Tensor:
    c = x
    if len(cell.units) == 3 and isinstance(cell.skip, UpSkip):  # an inverted residual upsamples first
        c = F.interpolate(x, scale_factor=2, mode="nearest")
    for unit in cell.units:
        c = plain_unit(unit, c)
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
    assert_same_values_and_gradients(cell, lambda x: plain_cell(cell, x), x, rtol=1e-8, atol=1e-10)


# activation (BN- where normalised), kernel, stride, dilation, groups, whether it has a bias and weight normalisation
MIDDLES: dict[tuple[Architecture, Side], list[str]] = {
    ("res_elu", "encoder"): ["elu 3 2 1 1 True", "elu 3 1 1 1 True"],
    ("res_bnelu", "decoder"): ["BN-elu 3 2 1 1 True", "BN-elu 3 1 1 1 True"],
    ("res_mbconv", "preprocess"): ["BN-swish 3 2 1 1 True", "BN-swish 3 1 1 1 True"],
    ("res_mbconv", "decoder"): ["BN-none 1 1 1 1 False", "BN-swish 5 2 1 48 False", "BN-swish 1 1 1 1 False"],
    ("res_mbconv", "postprocess"): ["BN-none 1 1 1 1 False", "BN-swish 5 2 1 24 False", "BN-swish 1 1 1 1 False"],
    ("res53_mbconv", "encoder"): ["BN-swish 3 2 2 1 True", "BN-swish 3 1 1 1 True"],
    ("res35_mbconv", "encoder"): ["BN-swish 3 2 1 1 True", "BN-swish 3 1 2 1 True"],
    ("res55_mbconv", "encoder"): ["BN-swish 3 2 2 1 True", "BN-swish 3 1 2 1 True"],
    ("mbconv_sep", "encoder"): ["BN-none 1 1 1 1 False", "BN-swish 5 2 1 48 False", "BN-swish 1 1 1 1 False"],
    ("mbconv_sep", "preprocess"): ["BN-none 1 1 1 1 False", "BN-swish 5 2 1 24 False", "BN-swish 1 1 1 1 False"],
    ("mbconv_res", "decoder"): ["BN-swish 3 2 1 1 True", "BN-swish 3 1 1 1 True"],
    ("mbconv_res", "encoder"): ["BN-none 1 1 1 1 False", "BN-swish 5 2 1 48 False", "BN-swish 1 1 1 1 False"],
    ("mbconv_sep11", "encoder"): ["BN-none 1 1 1 1 False", "BN-swish 11 2 1 48 False", "BN-swish 1 1 1 1 False"],
    ("mbconv_den", "preprocess"): ["BN-none 1 1 1 1 False", "BN-swish 5 2 1 8 False", "BN-swish 1 1 1 1 False"],
}


@pytest.mark.parametrize(("architecture", "side"), MIDDLES)
def test_a_stride_2_cells_convolutions_are_the_published_ones(architecture: Architecture, side: Side) -> None:
    cell: Any = make_cell(architecture, side, 8, 16, "down")
    found = []
    for u in cell.units:
        assert (u.bias is None) == (u.log_norm is None)
        name = u.activation if u.gamma is None else f"BN-{u.activation}"
        found.append(f"{name} {u.weight.shape[-1]} {u.stride} {u.dilation} {u.groups} {u.bias is not None}")
    assert found == MIDDLES[architecture, side]
    assert (cell.tail.gamma is None) == (len(found) == 2)


def statistics(module: nn.Module) -> list[Tensor]:
    return [v.clone() for k, v in module.named_buffers() if "running" in k]


@pytest.mark.parametrize("architecture", CELLS)
def test_cheap_cells_give_the_same_numbers_and_move_statistics_once(architecture: Architecture) -> None:
    runs: list[Any] = []
    for recompute in (False, True):
        cell = scrambled(make_cell(architecture, "decoder", 8, 4, "up"), dtype=torch.float32)
        set_recompute(cell, recompute)
        x = normals(2, 8, 8, 8, dtype=torch.float32).requires_grad_()
        y = cell(x)
        gx, *own = torch.autograd.grad(y.square().sum(), [x, *cell.parameters()])
        runs.append(
            (y.detach(), gx, torch.cat([g.flatten() for g in own]), torch.cat(statistics(cell) or [y.flatten()]))
        )
    (y, gx, own, moved), (cheap_y, cheap_gx, cheap_own, cheap_moved) = runs
    assert torch.equal(y, cheap_y) and torch.equal(moved, cheap_moved)
    for a, b in ((gx, cheap_gx), (own, cheap_own)):  # not one by one: a bias before a BatchNorm has a gradient of 0
        assert (a - b).norm() <= 1e-6 * a.norm()


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
assert recipe("ffhq256").model == recipe("celebahq256").model  # so one of the two is enough


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in BIG else n for n in EXACT])
def test_exact_parameters_groups_and_latent_dimensions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, parameters, groups, dimensions = EXACT[name]
    monkeypatch.setattr(F, "normalize", lambda x, dim: x)  # half of the time of a build on meta, where no value matters
    with torch.device("meta"):
        model = NVAE(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.scale_groups == groups and config.latent_dims == dimensions
    assert len(model.latent_shapes) == sum(groups)
    assert sum(math.prod(shape) for shape in model.latent_shapes) == dimensions


# --- every kind of network --------------------------------------------------------------------------------------------


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
        model.settings.coefficient = coefficient
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
