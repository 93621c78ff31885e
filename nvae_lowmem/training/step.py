"""One training step: micro-batches forward and backward, then one update. The step that trains is the step traced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvae_lowmem.config import Profile
from nvae_lowmem.model.latents import Noise, SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.regularizers import begin_micro_batch, end_step
from nvae_lowmem.training.objective import LossTerms, beta_at, regulariser_at


class Diverged(RuntimeError):
    """Training cannot go on: the loss or the gradients are no numbers any more. Its text says where and what to do."""


class Update(NamedTuple):
    """What the optimiser did: whether it skipped the step because of an overflow, and the true gradient norm."""

    overflow: bool
    gradient_norm: Tensor | float | None  # None where nobody asked for it


class Engine(Protocol):
    """Runs the objective on a device and updates its parameters; one process of `world_size`."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def model(self) -> NVAE:
        """The network itself."""
        ...

    @property
    def loss_scale(self) -> float:
        """What backward multiplies the loss by, besides 1 / accumulation."""
        ...

    def begin(self, learning_rate: float) -> None:
        """A step begins; an engine may update a parameter as soon as its gradient is complete."""
        ...

    def forward(self, x: Tensor, noise: Noise, beta: float) -> LossTerms:
        """One micro-batch through the objective."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of loss x loss scale / accumulation, added up; `last`: of the last micro-batch of this step."""
        ...

    def update(self) -> Update:
        """Unscale, clip, one optimiser step, gradients gone."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which every parameter is whole; all processes enter it together."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything training needs to go on, on the host, the same for every engine (see checkpoint.py)."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, from any engine, stage or number of processes."""
        ...


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
