"""The modules that own parameters: the convolution unit, chains of units, the residual tail with SE, the skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lowmem.model.functional import (
    RunningStatistics,
    effective_weight,
    power_iteration,
    recomputing,
)
from nvae_lowmem.model.hooks import LayerSettings
from nvae_lowmem.model.units import Chain, Tail, UnitSpec


class NormLayer(nn.Module):
    """A module with an optional BatchNorm of its own: gamma, beta and running statistics, all (C,).

    norm_channels: C of the BatchNorm; None: there is none.
    """

    gamma: nn.Parameter | None
    beta: nn.Parameter | None
    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, norm_channels: int | None) -> None:
        super().__init__()
        self.settings = LayerSettings()  # a hook: the model puts its own here
        self.recompute = False  # a hook: keep only what cannot be recomputed cheaply
        self.frozen = False  # a hook: statistics and power iterations stand still
        self.gamma = self.beta = None
        if norm_channels is not None:
            self.gamma = nn.Parameter(torch.ones(norm_channels))
            self.beta = nn.Parameter(torch.zeros(norm_channels))
            self.register_buffer("running_mean", torch.zeros(norm_channels))
            self.register_buffer("running_variance", torch.ones(norm_channels))

    def running(self) -> RunningStatistics | None:
        """The running statistics and how they are to be used now."""
        if self.gamma is None:
            return None
        training = self.training and not self.frozen
        return RunningStatistics(self.running_mean, self.running_variance, self.settings.momentum, training)


class ConvUnit(NormLayer):
    """[BatchNorm] -> [activation] -> [x2 nearest upsampling] -> k x k convolution, (B,C,H,W) -> (B,O,H',W').

    weight_norm: w = exp(log_norm) * weight / (||weight|| + 1e-5); mask multiplies the weight before that.
    u, v: the largest singular pair of the weight as it is used, moved by power iteration in training; sigma: u^T w v.
    """

    mask: Tensor | None
    u: Tensor
    v: Tensor
    sigma: Tensor

    def __init__(
        self,
        in_channels: int,  # C
        out_channels: int,  # O
        kernel: int,  # k, odd: padding keeps the size
        *,
        norm: bool = False,  # BatchNorm before the activation
        activation: str = "none",  # before the convolution: a key of functional.ACTIVATIONS
        upsample: bool = False,  # x2 nearest, between activation and convolution
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,  # C for a depthwise convolution
        bias: bool = True,
        weight_norm: bool = True,  # one learned log norm per output channel
        mask: Tensor | None = None,  # (O, C/groups, k, k) of zeros and ones
    ) -> None:
        super().__init__(in_channels if norm else None)
        self.pre_run_hook: Callable[[ConvUnit, Tensor], None] | None = None
        reference = nn.Conv2d(in_channels, out_channels, kernel, groups=groups, bias=bias)  # for its initialisation
        self.weight, self.bias = _parameters(reference)
        self.activation, self.upsample = activation, upsample
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = dilation * (kernel // 2)
        self.register_buffer("mask", mask, persistent=False)
        self.log_norm: nn.Parameter | None = None
        if weight_norm:
            masked = self.weight.detach() if mask is None else self.weight.detach() * mask
            norms = torch.linalg.vector_norm(masked.flatten(1), dim=1).view(-1, 1, 1, 1)
            self.log_norm = nn.Parameter((norms + 1e-2).log())
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(self.weight[0].numel()), dim=0))
        self.register_buffer("sigma", torch.zeros(()), persistent=False)

    def spec(self) -> UnitSpec:
        """What this unit does, for the autograd function."""
        return UnitSpec(
            self.activation, self.upsample, self.stride, self.padding, self.dilation, self.groups, self.mask,
            self.u, self.v, self.settings,
        )  # fmt: skip

    def parameter_row(self) -> tuple[Tensor | None, ...]:
        """The five tensors of a unit, None where absent."""
        return self.weight, self.log_norm, self.bias, self.gamma, self.beta

    @torch.no_grad()
    def iterate(self) -> None:
        """The power iterations that are due, once per step however often the unit runs."""
        if self.training and not self.frozen and self.settings.iterations and not recomputing():
            w = effective_weight(self.weight, self.log_norm, self.mask)
            self.sigma.copy_(power_iteration(w, self.u, self.v, self.settings.iterations))

    def forward(self, x: Tensor) -> Tensor:
        return run_units((self,), x, save_conv_inputs=not self.recompute)


def _parameters(reference: nn.Conv2d | nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The initialised weight and bias of a torch module that is made for them alone."""
    return cast(nn.Parameter, reference.weight), cast("nn.Parameter | None", reference.bias)


def run_units(units: tuple[ConvUnit, ...], x: Tensor, *, save_conv_inputs: bool) -> Tensor:
    """The units one after the other as one autograd node, (B,C,H,W) -> (B,O,H',W').

    save_conv_inputs: keep what each convolution read; without it only x is kept.
    """
    for unit in units:
        if unit.pre_run_hook is not None:
            assert len(units) == 1, "only the first unit of a chain has its input here"
            unit.pre_run_hook(unit, x)
        unit.iterate()
    parameters = [p for unit in units for p in unit.parameter_row()]
    specs, runnings = tuple(u.spec() for u in units), tuple(u.running() for u in units)
    return Chain.apply(x, specs, runnings, save_conv_inputs, *parameters)


class ResidualTail(NormLayer):
    """skip + 0.1 * SE([BatchNorm](c)): the end of every cell, (B,C,H,W) twice -> (B,C,H,W).

    SE: mean over H,W -> Linear(C, max(C // 16, 4)) -> ReLU -> Linear(.., C) -> sigmoid -> scale.
    """

    def __init__(
        self,
        channels: int,  # C
        *,
        norm: bool,  # BatchNorm on c: the branch ends without one
        squeeze_excitation: bool,  # SE between BatchNorm and sum
    ) -> None:
        super().__init__(channels if norm else None)
        self.squeeze_weight: nn.Parameter | None = None
        self.squeeze_bias: nn.Parameter | None = None
        self.excite_weight: nn.Parameter | None = None
        self.excite_bias: nn.Parameter | None = None
        if squeeze_excitation:
            hidden = max(channels // 16, 4)
            squeeze, excite = nn.Linear(channels, hidden), nn.Linear(hidden, channels)  # for their initialisation
            self.squeeze_weight, self.squeeze_bias = _parameters(squeeze)
            self.excite_weight, self.excite_bias = _parameters(excite)

    def forward(self, skip: Tensor, c: Tensor) -> Tensor:
        return Tail.apply(
            skip, c, self.running(), not self.recompute, self.settings, self.gamma, self.beta,
            self.squeeze_weight, self.squeeze_bias, self.excite_weight, self.excite_bias,
        )  # fmt: skip


class DownSkip(nn.Module):
    """swish, then four 1x1 stride-2 convolutions on the pixel offsets (0,0),(1,1),(0,1),(1,0), concatenated."""

    OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0))  # [row, column]

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        widths = (quarter, quarter, quarter, out_channels - 3 * quarter)
        self.parts = nn.ModuleList(ConvUnit(in_channels, width, 1, stride=2) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        s = F.silu(x)
        parts = [part(s[:, :, row:, column:]) for part, (row, column) in zip(self.parts, self.OFFSETS, strict=True)]
        return torch.cat(parts, dim=1)  # (B, out_channels, H/2, W/2)


class UpSkip(nn.Module):
    """Bilinear x2 (align_corners), then a 1x1 convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.project = ConvUnit(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
