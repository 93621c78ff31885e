"""How long a training step takes on a card, from what its operations compute and move. It ranks plans, no more.

Every operation of the step takes the longest of three times (a roofline): its convolution's arithmetic at the card's
rate for the dtype, its bytes at the card's bandwidth, and the launch of a kernel. To that come the link to the host
(gradients down, weights up, parked block inputs) and the optimiser where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.model.regularizers import ITERATIONS

aten = torch.ops.aten
Floats = npt.NDArray[np.float64]

# What real kernels reach of a data sheet's figures, and what a launch costs: round numbers that are common to small
# cards. Plans are compared under the same ones, so they decide only between arithmetic and bandwidth.
ARITHMETIC_SHARE, BANDWIDTH_SHARE, LAUNCH_SECONDS = 0.5, 0.75, 8e-6
HOST_SECONDS_PER_PARAMETER = 1.02e-9
"""Measured: the host's Adamax takes 102 ms for 100 million parameters on two threads."""
UPDATE_BYTES_PER_PARAMETER = 80  # Adamax on the card reads and writes about twenty fp32 values per parameter
LAUNCHES_PER_POWER_ITERATION = 10  # two products, two norms with their clamps and divisions, two copies
RETRY_SECONDS = 0.1
"""Seconds of one return of the allocator's cache: assumed, measured on no card. The card runs empty, some hundred
segments go back to the driver and are taken anew, each at a few tenths of a millisecond."""
BACKWARD_SHARE = 0.6  # of a step without recomputation, two of three parts are backward


@dataclass(frozen=True)
class Rates:
    """What a card does per second for a plan, after the shares above."""

    fp32_flops: float
    half_flops: float
    bandwidth_bytes: float
    link_bytes: float
    """Between host and card, from the kind of memory the plan keeps its weights in."""
    pinned_link_bytes: float
    """The same from page-locked memory, where parked block inputs always are."""


def rates_of(card: Card, cap_bytes: int = 0, pin_memory: bool = False) -> Rates:
    """The rates of a card whose allocator may take `cap_bytes`.

    Where that passes the fast segment (GTX 970: 3.5 GB), the share of the traffic that goes to the slow one adds up
    with the rest, because both segments are never read together.
    """
    bandwidth = card.bandwidth_bytes_per_second
    fast_bytes = card.total_bytes_linux - card.slow_segment_bytes
    used_bytes = cap_bytes + card.context_bytes
    if card.slow_segment_bytes and used_bytes > fast_bytes:
        slow = (used_bytes - fast_bytes) / used_bytes
        bandwidth = 1 / ((1 - slow) / bandwidth + slow / card.slow_bandwidth_bytes_per_second)
    link = card.pcie_pinned_bytes_per_second if pin_memory else card.pcie_pageable_bytes_per_second
    return Rates(
        fp32_flops=ARITHMETIC_SHARE * card.fp32_flops_per_second,
        half_flops=ARITHMETIC_SHARE * card.fp16_flops_per_second,
        bandwidth_bytes=BANDWIDTH_SHARE * bandwidth,
        link_bytes=link,
        pinned_link_bytes=card.pcie_pinned_bytes_per_second,
    )


@dataclass(frozen=True)
class OperationCosts:
    """Operations, one entry each: convolution arithmetic per image, bytes moved in any case and per image."""

    flops_per_image: Floats
    bytes_fixed: Floats
    bytes_per_image: Floats
    half: npt.NDArray[np.bool_]
    """Whether the arithmetic is in 16 bits."""

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, float, bool]]) -> OperationCosts:
        """From one row per operation."""
        table = np.array(rows, dtype=np.float64).reshape(-1, 4)
        return cls(table[:, 0], table[:, 1], table[:, 2], table[:, 3] > 0)

    def seconds(self, images: int, rates: Rates) -> float:
        """Time of all operations for a batch of `images`."""
        flops_rate = np.where(self.half, rates.half_flops, rates.fp32_flops)
        moving = (self.bytes_fixed + self.bytes_per_image * images) / rates.bandwidth_bytes
        slower = np.maximum(self.flops_per_image * images / flops_rate, moving)
        return float(np.maximum(slower, LAUNCH_SECONDS).sum())

    def flops(self) -> float:
        """Convolution arithmetic of one image; a multiply-add is two."""
        return float(self.flops_per_image.sum())


def operation_costs(func: Any, args: Any, kwargs: Any, out: Any, batch: int) -> tuple[float, float, float, bool] | None:
    """The row of `OperationCosts` of one dispatched operation on `batch` images; None for one that moves nothing.

    A tensor is counted per image where `batch` divides its bytes: choose a prime that no other size has as a factor.
    """
    if is_view(func):
        return None
    outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    fixed = per_image = 0.0
    for t in [*inputs, *outputs]:
        nbytes = t.numel() * t.element_size()
        if nbytes % batch:
            fixed += nbytes
        else:
            per_image += nbytes / batch
    flops, half = convolution_flops(func, args, outputs)
    return flops / batch, fixed, per_image, half


@cache
def is_view(func: Any) -> bool:
    """Whether the operation only looks at its argument in another way."""
    aliases = [r.alias_info for r in func._schema.returns]
    # _unsafe_view hands on its argument, though its schema does not say so
    return func is aten._unsafe_view.default or any(a is not None and not a.is_write for a in aliases)


def convolution_flops(func: Any, args: Any, outputs: Sequence[Tensor]) -> tuple[float, bool]:
    """(operations, whether in 16 bits) of a convolution or its backward; a multiply-add is two. 0 for anything else.

    Our own, because torch.utils.flop_counter's conv_backward_flop ignores `groups`: it counts the weight's gradient as
    that of a dense convolution, which for NVAE's depthwise ones is as many times too much as there are channels.
    """
    if func is aten.convolution.default:
        return 2.0 * outputs[0].numel() * args[1][0].numel(), args[1].element_size() == 2
    if func is aten.convolution_backward.default:
        gradient, weight, wanted = args[0], args[2], args[10]
        # every output position meets every weight of its channel once, for the input's and for the weight's gradient
        return 2.0 * gradient.numel() * weight[0].numel() * (wanted[0] + wanted[1]), weight.element_size() == 2
    return 0.0, False


@dataclass(frozen=True)
class StepSeconds:
    """A step's parts in seconds; those of the host and the link as far as the card waits for them."""

    card: float
    link: float
    optimizer: float
    retries: float = 0.0
    """Where the allocator runs full: waiting for the card, giving back its cache and allocating again."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.card + self.link + self.optimizer + self.retries

    def with_retries(self, count: int) -> StepSeconds:
        """The same step when the allocator gives back its cache so many times."""
        return replace(self, retries=count * RETRY_SECONDS)


def step_seconds(
    profile: Profile, micro_batch_seconds: float, accumulation: int, parameters: int, convolutions: int, rates: Rates
) -> StepSeconds:
    """One optimiser step of the plan.

    micro_batch_seconds: all blocks forward and backward. Every micro-batch's gradients (4 bytes per parameter) go down
    and once the weights come up, where the optimiser runs on the host.
    """
    plan = profile.plan
    weight_bytes = 4.0 * parameters
    moving = 2 * weight_bytes / rates.bandwidth_bytes
    launches = convolutions * LAUNCHES_PER_POWER_ITERATION * LAUNCH_SECONDS
    card = accumulation * micro_batch_seconds + ITERATIONS * max(moving, launches)
    if not plan.offload_optimizer:
        return StepSeconds(card, 0.0, UPDATE_BYTES_PER_PARAMETER * parameters / rates.bandwidth_bytes)
    host = HOST_SECONDS_PER_PARAMETER * parameters
    if plan.engine != "deepspeed" and plan.precision != "fp16" and not profile.training.clip_norm:
        # nothing has to be known about all gradients first: the host updates while the card still goes backward
        host = max(0.0, host - BACKWARD_SHARE * micro_batch_seconds)
    return StepSeconds(card, (accumulation + 1) * weight_bytes / rates.link_bytes, host)
