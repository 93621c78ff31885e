"""Volume-preserving autoregressive flows on a group's latents (NVAE, arXiv 2007.03898, section 3.2).

    z <- z - mu(z)

mu of a pixel and channel depends on those before it alone, so the Jacobian is triangular with ones on its diagonal, and
the logarithm of its determinant is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nvae_lowmem.model.layers import ConvUnit, run_units


def causal_mask(out_channels: int, in_per_group: int, kernel: int, groups: int, strict: bool, mirror: bool) -> Tensor:
    """Mask (O, C/groups, k, k): rows above and pixels left of the centre are visible, the centre in channel order.

    At the centre, output channel block i sees the input channel blocks <= i (< i if strict); the blocks are as many as
    the smaller side has channels. A depthwise convolution (one input channel per group) sees its own centre.
    mirror flips the mask in space, so that the second cell of a pair reads the image the other way round.
    """
    centre = kernel // 2
    mask = torch.zeros(out_channels, in_per_group, kernel, kernel)
    mask[:, :, :centre, :] = 1
    mask[:, :, centre, :centre] = 1
    if groups == 1:
        blocks = min(out_channels, in_per_group)
        out_block = torch.arange(out_channels) // (out_channels // blocks)
        in_block = torch.arange(in_per_group) // (in_per_group // blocks)
        visible = in_block[None, :] < out_block[:, None] if strict else in_block[None, :] <= out_block[:, None]
        mask[:, :, centre, centre] = visible.float()
    elif not strict:
        mask[:, :, centre, centre] = 1
    return mask.flip(2, 3) if mirror else mask


class FlowCell(nn.Module):
    """One autoregressive cell, z (B, L, h, w) fp32 -> z - mu(z); its network computes in `dtype`.

    mu: masked 3x3 convolution (strict) to 6 L channels, ELU, masked depthwise 5x5, ELU twice, masked 1x1 to L.
    """

    EXPAND = 6

    def __init__(
        self,
        latents: int,  # L
        mirror: bool,  # read the image from its end
    ) -> None:
        super().__init__()
        hidden = self.EXPAND * latents
        self.recompute = False  # a hook: keep z alone, not the hidden layers
        self.first = ConvUnit(latents, hidden, 3, bias=False, mask=causal_mask(hidden, latents, 3, 1, True, mirror))
        self.depthwise = ConvUnit(
            hidden,
            hidden,
            5,
            activation="elu",
            groups=hidden,
            bias=False,
            mask=causal_mask(hidden, 1, 5, hidden, False, mirror),
        )
        self.last = ConvUnit(
            hidden, latents, 1, activation="elu_elu", mask=causal_mask(latents, hidden, 1, 1, False, mirror)
        )
        assert self.last.log_norm is not None
        with torch.no_grad():
            self.last.log_norm.sub_(math.log(10.0))  # starts near the identity

    def forward(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        units = (self.first, self.depthwise, self.last)
        mu = z.to(dtype)
        for segment in (units,) if self.recompute else ((unit,) for unit in units):
            mu = run_units(segment, mu, save_conv_inputs=not self.recompute)
        return z - mu.to(z.dtype)


class Flow(nn.Module):
    """`pairs` pairs of autoregressive cells, the second of each mirrored; z (B, L, h, w) -> same, log-det 0."""

    def __init__(self, pairs: int, latents: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(FlowCell(latents, mirror) for _ in range(pairs) for mirror in (False, True))

    def forward(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        for cell in self.cells:
            z = cell(z, dtype)
        return z
