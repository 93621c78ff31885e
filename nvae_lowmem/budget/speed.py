"""Seconds of a step of a model that nobody has trained yet: on a card from the speed model, on a CPU by trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Protocol

import torch

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.precision import choose_precision
from nvae_lowmem.memory.plan.block_costs import BlockTable, record_blocks
from nvae_lowmem.memory.plan.candidates import Planner, Wishes
from nvae_lowmem.memory.plan.duration import StepTime
from nvae_lowmem.memory.plan.overhead import OverheadModel
from nvae_lowmem.training.build import build_model, build_training
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step

_TIMED_BATCHES, _TIMED_STEPS = (8, 24), 1


class Speed(Protocol):
    """What a step of a profile takes somewhere."""

    @property
    def where(self) -> str:
        """For people."""

    def step_time(self, profile: Profile) -> StepTime | None:
        """Of the profile's model at its total batch; None: no plan fits, as far as a quick look tells."""


@dataclass(frozen=True)
class CardSpeed:
    """On a card, under the best plan that the planner's table of block costs has room for; nothing is predicted yet."""

    card: Card
    budget: Budget
    wishes: Wishes
    _tables: dict[ModelConfig, BlockTable] = field(default_factory=dict, compare=False, repr=False)

    @property
    def where(self) -> str:
        return f"a {self.card.name}"

    def step_time(self, profile: Profile) -> StepTime | None:
        precision, _ = choose_precision(profile.plan.precision, self.card)
        decided = profile.with_plan(precision=precision, micro_batch=0)
        table = self.table(decided)
        planner = Planner(profile=decided, card=self.card, budget=self.budget, wishes=self.wishes, table=table)
        best = planner.best(OverheadModel(self.budget.cap_bytes))
        whole = best is not None and best.groups == decided.model.scale_groups
        return best.time if best is not None and whole else None

    def table(self, profile: Profile) -> BlockTable:
        """The block costs of a profile's model, whose precision is decided."""
        if profile.model not in self._tables:
            self._tables[profile.model] = record_blocks(profile)
        return self._tables[profile.model]


@dataclass(frozen=True)
class CpuSpeed:
    """On this machine's CPU: a few real steps at two batch sizes, and a line through them for all others."""

    clock: Callable[[], float] = time.perf_counter
    _lines: dict[ModelConfig, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def where(self) -> str:
        return f"this machine's CPU ({torch.get_num_threads()} threads)"

    def step_time(self, profile: Profile) -> StepTime | None:
        if profile.model not in self._lines:
            small, large = _TIMED_BATCHES
            first, second = (self._timed(profile, images) for images in _TIMED_BATCHES)
            per_image = max(0.0, (second - first) / (large - small))
            self._lines[profile.model] = max(0.0, first - small * per_image), per_image
        fixed, per_image = self._lines[profile.model]
        images = profile.training.total_batch
        seconds = fixed + per_image * images
        return StepTime(least_seconds=seconds, most_seconds=seconds, images=images, measured_on=self.where)

    def _timed(self, profile: Profile, images: int) -> float:
        """Seconds of a step of so many images; the first one, which sets everything up, does not count."""
        c = profile.model
        plain = replace(profile, plan=replace(profile.plan, precision="fp32"))
        training = build_training(run_without_data(plain, images), build_model(plain), torch.device("cpu"))
        batch = repeat(MicroBatch(0, torch.zeros(images, c.image_channels, c.network_size, c.network_size)))
        training_step(training, batch, 0)
        began = self.clock()
        for step in range(1, 1 + _TIMED_STEPS):
            training_step(training, batch, step)
        return (self.clock() - began) / _TIMED_STEPS
