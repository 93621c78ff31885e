"""One training step: micro-batches forward and backward, then one update. The step that trains is the step traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.objective import beta_at, regulariser_at
from nvae_lowmem.model.regularizers import begin_micro_batch, end_step
from nvae_lowmem.training.engines.engine import Engine, Update


@dataclass(frozen=True)
class BatchPlan:
    """How the total batch is split: total = micro x accumulation x processes."""

    total: int
    micro: int
    accumulation: int
    processes: int

    def __str__(self) -> str:
        return (
            f"total batch {self.total} = micro-batch {self.micro} x accumulation {self.accumulation} "
            f"x processes {self.processes}"
        )

    def first_slot(self, rank: int, index: int) -> int:
        """The first sample slot of micro-batch `index` of process `rank` within the total batch."""
        return (index * self.processes + rank) * self.micro


class StepResult(NamedTuple):
    """One step's figures, still on the device: means over the total batch of this process."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    active: Tensor
    coefficients: Tensor
    beta: float
    regulariser: float
    update: Update


Images = Callable[[int, int, int], Tensor]  # (step, first slot, count) -> (count, C, S, S) on the engine's device


def training_step(
    engine: Engine,
    profile: Profile,
    split: BatchPlan,
    images: Images,
    step: int,
    total_steps: int,
    learning_rate: float,
) -> StepResult:
    """Optimiser step `step`: every micro-batch forward and backward, then one update."""
    beta = beta_at(step, total_steps, profile.training)
    weight = regulariser_at(beta, profile.training)
    coefficient = weight * engine.loss_scale / split.accumulation
    sums: list[Tensor] | None = None
    engine.begin(learning_rate)
    for index in range(split.accumulation):
        slot = split.first_slot(engine.rank, index)
        x = images(step, slot, split.micro)
        begin_micro_batch(engine.model, index, split.accumulation, coefficient, step)
        terms = engine.forward(x, SeededNoise(profile.training.seed, step, slot), beta)
        engine.backward(terms.loss, last=index == split.accumulation - 1)
        shown = [terms.loss.detach(), *terms[1:]]
        del terms, x
        sums = shown if sums is None else [a.add_(b) for a, b in zip(sums, shown, strict=True)]
        del shown
    update = engine.update()
    end_step(engine.model)
    assert sums is not None
    loss, nll, kl, active, coefficients = (s / split.accumulation for s in sums)
    return StepResult(loss, nll, kl, active, coefficients, beta, weight, update)
