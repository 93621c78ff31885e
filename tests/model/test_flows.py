"""Flows: what a mask shows, strict causality in both directions, volume, inverse, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    assert_gradcheck,
    assert_same_values_and_gradients,
    normals,
    plain_unit,
    plain_weight,
    saved_storages,
    scrambled,
    set_recompute,
    with_both_keeps,
)
from torch import Tensor, nn

from nvae_lowmem.model.flows import Flow, FlowCell, causal_mask
from nvae_lowmem.model.layers import ConvUnit

LATENTS, SIZE = 3, 3
in_both_directions = pytest.mark.parametrize("mirror", [False, True], ids=["forwards", "mirrored"])


class InDouble(nn.Module):
    """A flow whose network computes in float64, with weights large enough to bend z visibly."""

    def __init__(self, flow: Flow | FlowCell, seed: int = 0) -> None:
        super().__init__()
        self.flow = scrambled(flow, seed)

    def forward(self, z: Tensor) -> Tensor:
        return self.flow(z, torch.float64)


def jacobian_in_raster_order(flow: nn.Module, z: Tensor) -> Tensor:
    """d flow(z) / d z, (h*w*L, h*w*L): rows and columns ordered by pixel row, pixel column, channel."""
    _, channels, height, width = z.shape
    j = torch.autograd.functional.jacobian(flow, z)[0, :, :, :, 0]  # (L, h, w, L, h, w)
    return j.permute(1, 2, 0, 4, 5, 3).reshape(height * width * channels, height * width * channels)


# --- masks ------------------------------------------------------------------------------------------------------------


@given(
    blocks=st.integers(1, 4), out_per_block=st.integers(1, 3), in_per_block=st.integers(1, 3),
    kernel=st.sampled_from([1, 3, 5]), strict=st.booleans(), mirror=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_mask_shows_what_was_read_before_and_the_centre_in_channel_order(
    blocks: int, out_per_block: int, in_per_block: int, kernel: int, strict: bool, mirror: bool
) -> None:
    # the blocks are as many as the smaller side has channels, so one side has a single channel per block
    if out_per_block > 1:
        in_per_block = 1
    mask = causal_mask(blocks * out_per_block, blocks * in_per_block, kernel, 1, strict, mirror)
    assert mask.shape == (blocks * out_per_block, blocks * in_per_block, kernel, kernel)
    centre = kernel // 2
    for o, i, row, column in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        place, here = row * kernel + column, centre * kernel + centre
        if place == here:
            seen, sees = i // in_per_block, o // out_per_block
            visible = seen < sees if strict else seen <= sees
        else:
            visible = place > here if mirror else place < here
        assert mask[o, i, row, column] == float(visible)


@given(channels=st.integers(1, 6), kernel=st.sampled_from([1, 3, 5]), strict=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_depthwise_mask_and_its_mirror_share_the_whole_kernel(channels: int, kernel: int, strict: bool) -> None:
    both = [causal_mask(channels, 1, kernel, channels, strict, mirror) for mirror in (False, True)]
    expected = torch.ones(channels, 1, kernel, kernel)
    expected[:, :, kernel // 2, kernel // 2] = 0 if strict else 2  # a channel may see its own centre unless strict
    assert torch.equal(both[0] + both[1], expected)
    assert torch.equal(both[0].flip(2, 3), both[1])


@given(channels=st.integers(1, 5), expand=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_two_masks_in_a_row_are_strict_if_the_first_is(channels: int, expand: int) -> None:
    first = causal_mask(expand * channels, channels, 1, 1, True, False)[:, :, 0, 0]
    last = causal_mask(channels, expand * channels, 1, 1, False, False)[:, :, 0, 0]
    reaches = (last @ first) > 0  # [output channel, input channel]
    assert torch.equal(reaches, torch.ones(channels, channels).tril(-1) > 0)


# --- cells ------------------------------------------------------------------------------------------------------------


@in_both_directions
@pytest.mark.parametrize("seed", [0, 1])
def test_a_cell_is_autoregressive_in_raster_and_channel_order(mirror: bool, seed: int) -> None:
    cell = InDouble(FlowCell(LATENTS, mirror), seed)
    j = jacobian_in_raster_order(cell, normals(1, LATENTS, SIZE, SIZE, seed=seed))
    if mirror:  # pixels the other way round, channels as they are
        pixels = torch.arange(SIZE * SIZE).flip(0)[:, None] * LATENTS + torch.arange(LATENTS)
        j = j[pixels.flatten()][:, pixels.flatten()]
    assert torch.equal(j, j.tril())
    assert torch.equal(j.diagonal(), torch.ones(len(j), dtype=j.dtype))
    below = torch.ones_like(j).tril(-1) > 0
    assert (j[below] != 0).float().mean() > 0.75  # and it does look at what it may see
    assert (j.diagonal(-1).view(-1)[[0, 1]] != 0).all()  # earlier channels of the same pixel
    assert (j[LATENTS : 2 * LATENTS, :LATENTS] != 0).all()  # every channel of the pixel before


@with_both_keeps
@in_both_directions
def test_a_cell_subtracts_what_its_three_masked_convolutions_say(mirror: bool, recompute: bool) -> None:
    cell = InDouble(FlowCell(LATENTS, mirror))
    set_recompute(cell, recompute)

    def plain(z: Tensor) -> Tensor:
        first, depthwise, last = cell.flow.first, cell.flow.depthwise, cell.flow.last
        h = F.conv2d(z, plain_weight(first), padding=1)
        h = F.conv2d(F.elu(h), plain_weight(depthwise), padding=2, groups=6 * LATENTS)
        return z - F.conv2d(F.elu(F.elu(h)), plain_weight(last), last.bias)

    assert_same_values_and_gradients(cell, plain, normals(2, LATENTS, 4, 4))


@in_both_directions
def test_the_last_convolution_starts_with_a_tenth_of_its_norm(mirror: bool) -> None:
    cell: Any = FlowCell(LATENTS, mirror)
    for unit, lowered_by in ((cell.first, 0.0), (cell.depthwise, 0.0), (cell.last, math.log(10.0))):
        norms = (unit.weight * unit.mask).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(unit.log_norm, torch.log(norms + 1e-2) - lowered_by)


# --- flows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_flow_preserves_volume_and_covers_both_directions(pairs: int) -> None:
    flow = InDouble(Flow(pairs, LATENTS))
    j = jacobian_in_raster_order(flow, normals(1, LATENTS, SIZE, SIZE))
    sign, log_abs_det = torch.linalg.slogdet(j)
    assert sign == 1 and log_abs_det.abs() < 1e-9
    pixels = SIZE * SIZE
    influence = j.abs().view(pixels, LATENTS, pixels, LATENTS).amax((1, 3))  # [output pixel, input pixel]
    assert (influence > 0).all()


def test_a_flow_alternates_directions_pair_by_pair() -> None:
    cells: Any = Flow(2, LATENTS).cells
    masks = [cell.depthwise.mask for cell in cells]
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    assert torch.equal(masks[0].flip(2, 3), masks[1])


def test_a_flow_has_an_inverse() -> None:
    """A strictly causal mu makes z = y + mu(z) a fixed-point iteration that is exact after one pass per value."""
    flow = InDouble(Flow(1, LATENTS))
    z = normals(2, LATENTS, SIZE, SIZE)
    y = flow(z)
    assert (y - z).abs().max() > 0.1
    for cell in reversed(flow.flow.cells):
        found = torch.zeros_like(y)
        for _ in range(LATENTS * SIZE * SIZE):
            found = y + (found - cell(found, torch.float64))
        y = found
    torch.testing.assert_close(y, z)


@with_both_keeps
def test_a_flows_gradient_matches_finite_differences(recompute: bool) -> None:
    flow = InDouble(Flow(1, 2))
    set_recompute(flow, recompute)
    assert_gradcheck(flow, normals(2, 2, 3, 3))


@with_both_keeps
def test_a_cheap_cell_keeps_z_alone(recompute: bool) -> None:
    cell = FlowCell(LATENTS, False)
    set_recompute(cell, recompute)
    z = normals(2, LATENTS, SIZE, SIZE, dtype=torch.float32).requires_grad_()
    maps = saved_storages(cell, z, torch.float32).values()
    hidden_maps = 0 if recompute else 4  # the input of each later convolution, before and after its activation
    assert sum(t.untyped_storage().nbytes() for t in maps) == (1 + 6 * hidden_maps) * z.nbytes


def test_masked_weights_get_no_gradient() -> None:
    flow = InDouble(Flow(1, LATENTS))
    flow(normals(2, LATENTS, SIZE, SIZE)).square().sum().backward()
    for unit in flow.modules():
        if isinstance(unit, ConvUnit):
            assert unit.mask is not None and unit.weight.grad is not None
            assert not unit.weight.grad[unit.mask == 0].any()
            assert unit.weight.grad[unit.mask == 1].any()


def test_latents_stay_fp32_while_the_flows_network_computes_in_bf16() -> None:
    flow = scrambled(Flow(1, LATENTS), dtype=torch.float32)
    z = normals(2, LATENTS, SIZE, SIZE, dtype=torch.float32).requires_grad_()
    assert {t.dtype for t in saved_storages(flow, z, torch.bfloat16).values()} == {torch.bfloat16}
    y = flow(z, torch.bfloat16)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, flow(z, torch.float32), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert z.grad is not None and z.grad.dtype == torch.float32


def test_units_of_a_flow_are_normalised_after_masking() -> None:
    unit = scrambled(FlowCell(LATENTS, False).first)
    changed = scrambled(FlowCell(LATENTS, False).first)
    changed.weight.data[changed.mask == 0] *= 100  # what the mask hides must not count in the norm
    z = normals(1, LATENTS, SIZE, SIZE)
    assert torch.equal(unit(z), changed(z))
    torch.testing.assert_close(unit(z), plain_unit(unit, z))
