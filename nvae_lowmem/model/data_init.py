"""What a model takes from its first images: scale and bias where there is no BatchNorm, BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_lowmem.model.cells import Cell
from nvae_lowmem.model.latents import Noise
from nvae_lowmem.model.layers import ConvUnit
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective


@torch.no_grad()
def initialise_from_data(model: NVAE, x: Tensor, noise: Noise) -> int:
    """Let every weight-normalised unit of a cell set itself from what images x (B, C, S, S) make it compute.

    With w = v / ||v|| and y = w * a, per output channel: bias = -mean(y) / (5 std(y)), log_norm = -log(5 std(y)), so
    that the unit's output has mean 0 and standard deviation 1/5. Returns how many units were set. In the order of the
    pass: a unit sees the output of those before it as they now are.
    """
    units = [u for cell in model.modules() if isinstance(cell, Cell) for u in cell.units if isinstance(u, ConvUnit)]
    units = [u for u in units if u.log_norm is not None]
    for unit in units:
        unit.pre_run_hook = _initialise
    try:
        model(x, noise)
    finally:
        for unit in units:
            unit.pre_run_hook = None
    return len(units)


@torch.no_grad()
def estimate_statistics(objective: Objective, micro_batches: Iterable[Tensor], noise: Noise) -> None:
    """Set BatchNorm's running statistics to their mean over micro-batches (b, C, S, S), seen as in training.

    Nothing else of the model changes. The weights are those of other images, whose statistics they bring along.
    """
    model, settings = objective.model, objective.model.settings
    training, momentum = model.training, settings.momentum
    try:
        model.train()
        for i, x in enumerate(micro_batches):
            settings.momentum = 1 / (i + 1)  # the mean over all so far; the first one forgets the old statistics
            objective(x, noise, 1.0)
    finally:
        settings.momentum = momentum
        model.train(training)


def _initialise(unit: ConvUnit, x: Tensor) -> None:
    a = {"none": lambda t: t, "elu": F.elu, "swish": F.silu}[unit.activation](x)
    if unit.upsample:
        a = F.interpolate(a, scale_factor=2, mode="nearest")
    norms = torch.linalg.vector_norm(unit.weight.flatten(1), dim=1).view(-1, 1, 1, 1)
    options: dict[str, Any] = {"padding": unit.padding, "dilation": unit.dilation, "groups": unit.groups}
    y = F.conv2d(a, unit.weight / norms, None, unit.stride, **options)
    std, mean = torch.std_mean(y, dim=(0, 2, 3))
    std = std.clamp_min(1e-6)  # a dead channel stays finite
    assert unit.log_norm is not None
    unit.log_norm.copy_(-(5 * std).log().view(-1, 1, 1, 1))
    if unit.bias is not None:
        unit.bias.copy_(-mean / (5 * std))
