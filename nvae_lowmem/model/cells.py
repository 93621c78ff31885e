"""Encoder and decoder cells: skip(x) + 0.1 * SE(branch(x)), in the published architectures."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from nvae_lowmem.config.model import Architecture
from nvae_lowmem.model.layers import ConvUnit, DownSkip, ResidualTail, UpSkip, run_units

Side = Literal["encoder", "preprocess", "decoder", "postprocess"]
Resample = Literal["keep", "down", "up"]


class Residual(NamedTuple):
    """2 x [norm, activation, 3x3 convolution], the convolutions dilated by `dilations`."""

    norm: bool
    activation: str
    dilations: tuple[int, int] = (1, 1)


class InvertedResidual(NamedTuple):
    """BN, 1x1 to expand*C, BN-swish, k x k depthwise (or in `groups` groups), BN-swish, 1x1 to C_out, BN."""

    expand: int
    kernel: int
    groups: int = 0  # 0: depthwise


Kind = Residual | InvertedResidual

_ELU, _BNELU, _SWISH = Residual(False, "elu"), Residual(True, "elu"), Residual(True, "swish")
_53, _35, _55 = (Residual(True, "swish", dilations) for dilations in ((2, 1), (1, 2), (2, 2)))
_E6, _E3 = InvertedResidual(6, 5), InvertedResidual(3, 5)
_E6K11, _E3G8 = InvertedResidual(6, 11), InvertedResidual(3, 5, 8)
# fmt: off
_ROWS: dict[Architecture, tuple[Kind, Kind, Kind, Kind]] = {
    # name           encoder  preprocess decoder  postprocess
    "res_elu":      (_ELU,    _ELU,      _ELU,    _ELU),
    "res_bnelu":    (_BNELU,  _BNELU,    _BNELU,  _BNELU),
    "res_bnswish":  (_SWISH,  _SWISH,    _SWISH,  _SWISH),
    "res_mbconv":   (_SWISH,  _SWISH,    _E6,     _E3),
    "res53_mbconv": (_53,     _53,       _E6,     _E3),
    "res35_mbconv": (_35,     _35,       _E6,     _E3),
    "res55_mbconv": (_55,     _55,       _E6,     _E3),
    "mbconv_sep":   (_E6,     _E3,       _E6,     _E3),
    "mbconv_sep11": (_E6K11,  _E3,       _E6K11,  _E3),
    "mbconv_res":   (_E6,     _E3,       _SWISH,  _SWISH),
    "mbconv_den":   (_E6,     _E3G8,     _E6,     _E3G8),
}
# fmt: on
_SIDES: tuple[Side, ...] = ("encoder", "preprocess", "decoder", "postprocess")
CELLS: dict[Architecture, dict[Side, Kind]] = {name: dict(zip(_SIDES, row, strict=True)) for name, row in _ROWS.items()}


def _residual_units(kind: Residual, in_channels: int, out_channels: int, resample: Resample) -> list[ConvUnit]:
    first, second = kind.dilations
    norm, activation, stride, up = kind.norm, kind.activation, 2 if resample == "down" else 1, resample == "up"
    return [
        ConvUnit(
            in_channels, out_channels, 3, norm=norm, activation=activation, dilation=first, stride=stride, upsample=up
        ),
        ConvUnit(out_channels, out_channels, 3, norm=norm, activation=activation, dilation=second),
    ]


def _inverted_units(kind: InvertedResidual, in_channels: int, out_channels: int, resample: Resample) -> list[ConvUnit]:
    wide, stride = kind.expand * in_channels, 2 if resample == "down" else 1

    def unit(i: int, o: int, kernel: int, activation: str, stride: int = 1, groups: int = 1) -> ConvUnit:
        return ConvUnit(
            i, o, kernel, norm=True, activation=activation, stride=stride, groups=groups, bias=False, weight_norm=False
        )

    return [
        unit(in_channels, wide, 1, "none"),
        unit(wide, wide, kind.kernel, "swish", stride, kind.groups or wide),
        unit(wide, out_channels, 1, "swish"),
    ]


class Cell(nn.Module):
    """One residual cell, (B, C_in, H, W) -> (B, C_out, H', W'); down halves H and W, up doubles them."""

    def __init__(
        self,
        kind: Kind,  # what the branch is made of
        in_channels: int,  # C_in
        out_channels: int,  # C_out
        resample: Resample,
        squeeze_excitation: bool,  # SE at the end of the branch
    ) -> None:
        super().__init__()
        self.skip: nn.Module = nn.Identity()
        if resample == "down":
            self.skip = DownSkip(in_channels, out_channels)
        elif resample == "up":
            self.skip = UpSkip(in_channels, out_channels)
        self.recompute = False  # a hook: run the branch so that only convolution outputs stay
        inverted = isinstance(kind, InvertedResidual)
        self.upsample_first = resample == "up" and inverted
        build = _inverted_units if inverted else _residual_units
        self.units = nn.ModuleList(build(kind, in_channels, out_channels, resample))  # type: ignore[arg-type]
        self.tail = ResidualTail(out_channels, norm=inverted, squeeze_excitation=squeeze_excitation)

    def forward(self, x: Tensor) -> Tensor:
        c = F.interpolate(x, scale_factor=2, mode="nearest") if self.upsample_first else x
        for segment in self.segments():
            c = run_units(segment, c, save_conv_inputs=not self.recompute)
        return self.tail(self.skip(x), c)

    def segments(self) -> list[tuple[ConvUnit, ...]]:
        """The units, grouped into autograd nodes. A node keeps its first input only.

        When recomputing, the depthwise convolution shares a node with the 1x1 after it: its output is the widest tensor
        of the cell and costs bandwidth, hardly arithmetic (25 multiplications per value), so it is not kept either.
        """
        units: list[ConvUnit] = list(self.units)  # type: ignore[arg-type]
        if self.recompute and len(units) == 3:
            return [(units[0],), (units[1], units[2])]
        return [(unit,) for unit in units]


def make_cell(
    architecture: Architecture,
    side: Side,
    in_channels: int,
    out_channels: int,
    resample: Resample = "keep",
    *,
    squeeze_excitation: bool = True,
) -> Cell:
    """The cell that `architecture` puts on `side`."""
    return Cell(CELLS[architecture][side], in_channels, out_channels, resample, squeeze_excitation)
