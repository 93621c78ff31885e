"""Finds where in a network the first inf or NaN arises: a weight, or a block's output in the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.training.resolve import ResolvedRun


@torch.no_grad()
def first_bad(model: NVAE, micro_batches: Iterable[MicroBatch], run: ResolvedRun, step: int) -> str:
    """A sentence on where optimiser step `step` (from 0) of these micro-batches first meets inf or NaN.

    Runs the micro-batches forward once more, so BatchNorm's statistics move. With whole weights, see Engine.gathered.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"The weights were bad already: {name} holds inf or NaN."
    config = run.profile.training
    objective = Objective(model, config, run.profile.plan.precision).to(next(model.parameters()).device)
    beta = run.beta(step)
    before, found = model.run_block, list[str]()

    def looking(name: str, block: nn.Module, *args: Any) -> Any:
        out = before(name, block, *args)
        if not found and any(not bool(t.isfinite().all()) for t in _tensors(out)):
            found.append(name)
        return out

    model.run_block = looking
    try:
        for slot, x, labels in micro_batches:
            if not bool(x.isfinite().all()):
                return "The images themselves hold inf or NaN."
            objective(x, SeededNoise(config.seed, step, slot), beta, labels)
            if found:
                return f"The first bad number is in the output of block {found[0]}, in the forward pass."
    finally:
        model.run_block = before
    return "Run once more, the forward pass is finite: what was bad came from outside the network."


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
