"""One training step: micro-batches forward and backward, one update, one move of the average.

The step that trains is the step that is traced and measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.objective import regulariser_at
from nvae_lowmem.model.regularizers import begin_micro_batch, end_step
from nvae_lowmem.training.divergence import check_loss_is_finite
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.engines.engine import Engine, Update
from nvae_lowmem.training.resolve import ResolvedRun


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a step works with, as `build_training` makes it."""

    run: ResolvedRun
    engine: Engine
    """Holds the model, its gradients and the optimiser."""
    ema: WeightEma | None
    """The average of the weights; None without one."""


class StepResult(NamedTuple):
    """One step's figures; tensors are still on the device: means over the total batch of this process."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    active: Tensor
    coefficients: Tensor
    beta: float
    regulariser: float
    learning_rate: float
    update: Update


def training_step(training: Training, micro_batches: Iterator[MicroBatch], step: int) -> StepResult:
    """Optimiser step `step`, counted from 0, of the next micro-batches of this process, on the engine's device.

    Raises Diverged, with weights, optimiser states and average as before the step, for a loss that is no number.
    """
    run, engine, config = training.run, training.engine, training.run.profile.training
    accumulation = run.split.accumulation
    beta = run.beta(step)
    weight = regulariser_at(beta, config)
    rate = run.learning_rate(step)
    coefficient = weight * engine.loss_scale / accumulation
    sums: list[Tensor] | None = None
    engine.begin(rate)
    for index in range(accumulation):
        slot, x, labels = next(micro_batches)
        begin_micro_batch(engine.model, index, accumulation, coefficient, step)
        terms = engine.forward(x, SeededNoise(config.seed, step, slot), beta, labels)
        check_loss_is_finite(terms, step + 1)  # before the backward pass, in which an engine may begin to update
        engine.backward(terms.loss, last=index == accumulation - 1)
        shown = [terms.loss.detach(), *terms[1:]]
        del terms, x, labels
        sums = shown if sums is None else [a.add_(b) for a, b in zip(sums, shown, strict=True)]
        del shown
    update = engine.update()
    end_step(engine.model)
    if training.ema is not None:
        with engine.gathered():
            training.ema.update(engine.model, step + 1)
    assert sums is not None
    loss, nll, kl, active, coefficients = (s / accumulation for s in sums)
    return StepResult(loss, nll, kl, active, coefficients, beta, weight, rate, update)
