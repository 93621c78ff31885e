"""From a profile and a machine to everything that training needs decided; every choice comes with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.precision import precision_here
from nvae_lowmem.training.learning_rate import suggest_learning_rate
from nvae_lowmem.training.step import BatchPlan


class Schedule(NamedTuple):
    """Counts of optimiser steps, and the peak learning rate."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak_rate: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A profile with every automatic choice made, and the reasons in words."""

    profile: Profile
    split: BatchPlan
    schedule: Schedule
    reasons: tuple[str, ...]


def split_batch(profile: Profile, processes: int) -> BatchPlan:
    """total = micro x accumulation x processes. Raises ConfigError where it does not divide."""
    total, micro = profile.training.total_batch, profile.micro_batch(processes)
    if total % processes:
        good = -(-total // processes) * processes
        raise ConfigError(
            f"training.total_batch = {total} cannot be divided among {processes} processes: use {good}, "
            "or start another number of processes"
        )
    share = total // processes
    if share % micro:
        fitting = ", ".join(str(m) for m in range(1, share + 1) if share % m == 0)
        raise ConfigError(
            f"plan.micro_batch = {micro} does not divide the {share} images of each process "
            f"(total batch {total} / {processes}): use one of {fitting}"
        )
    return BatchPlan(total, micro, share // micro, processes)


def plan_run(profile: Profile, images: int, device: torch.device, processes: int) -> RunPlan:
    """Decide precision, batch split, step counts and learning rate for `images` training images."""
    training = profile.training
    precision, why = precision_here(profile.plan.precision, device)
    split = split_batch(profile, processes)
    steps_per_epoch = max(1, images // training.total_batch)
    total = training.steps or max(1, round(training.epochs * steps_per_epoch))
    warmup = min(round(training.warmup_epochs * steps_per_epoch), total // 2)
    rate, why_rate = training.learning_rate, f"learning rate {training.learning_rate:g}: as given"
    if not rate:
        batch = int(profile.provenance.get("published_total_batch", 256))
        rate, why_rate = suggest_learning_rate(
            training.total_batch, batch, float(profile.provenance.get("published_learning_rate", 1e-2))
        )
    steps = f"{total} steps = {total / steps_per_epoch:.1f} epochs x {steps_per_epoch} steps ({images} images)"
    reasons = (str(split), steps, f"warm-up {warmup} steps", why_rate, f"precision {precision}: {why}")
    decided = profile.with_plan(precision=precision, micro_batch=split.micro)
    return RunPlan(
        profile=decided, split=split, schedule=Schedule(total, steps_per_epoch, warmup, rate), reasons=reasons
    )
