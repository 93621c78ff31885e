"""From a profile and a machine to everything that training needs decided; every choice comes with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nvae_lowmem.config.profile_file import CHANGED
from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.data.pipeline import steps_per_epoch
from nvae_lowmem.errors import command_line
from nvae_lowmem.hardware.precision import precision_here
from nvae_lowmem.model.objective import beta_at
from nvae_lowmem.training.batch_split import BatchSplit, split_batch
from nvae_lowmem.training.learning_rate import fine_tuning_rate, suggest_learning_rate
from nvae_lowmem.training.schedule import LONGEST_WARM_UP, Schedule
from nvae_lowmem.units import format_seconds


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A profile with every automatic choice made, and the reasons in words."""

    profile: Profile
    split: BatchSplit
    schedule: Schedule
    reasons: tuple[str, ...] = ()

    def beta(self, step: int) -> float:
        """The weight beta of the KL at optimiser step `step`, counted from 0."""
        return beta_at(*self.schedule.position(step), self.profile.training)

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimiser step `step`, counted from 0."""
        return self.schedule.learning_rate(step, self.profile.training.learning_rate_min)


def total_steps(training: TrainConfig, images: int) -> int:
    """Optimiser steps of the whole schedule on so many training images, where no hours are set."""
    return training.steps or max(1, round(training.epochs * steps_per_epoch(images, training.total_batch)))


def resolve_run(profile: Profile, images: int, device: torch.device, processes: int) -> ResolvedRun:
    """Decide precision, batch split, step counts and learning rate for `images` training images."""
    training = profile.training
    precision, why = precision_here(profile.plan.precision, device)
    split = split_batch(profile, processes)
    epoch, total = steps_per_epoch(images, training.total_batch), total_steps(training, images)
    warmup = round(training.warmup_epochs * epoch)
    if not training.hours:  # else it ends by the schedule's own rule: the number of steps is not known yet
        warmup = min(warmup, total // 2)
    rate, why_rate = training.learning_rate, f"learning rate {training.learning_rate:g}: as given"
    if not rate:
        rate, why_rate = suggest_learning_rate(
            training.total_batch, training.published_total_batch, training.published_learning_rate
        )
        if training.init_from:
            rate, why_rate = fine_tuning_rate(rate, why_rate)
    steps = f"{total} steps = {total / epoch:.1f} epochs x {epoch} steps ({images} images)"
    if training.hours:
        length = format_seconds(training.hours * 3600)
        steps = f"{length} of training, as many steps as that makes ({epoch} steps an epoch, {images} images)"
    longest = f", or {LONGEST_WARM_UP:.0%} of the time" if training.hours else ""
    reasons = [str(split), steps, f"warm-up {warmup} steps{longest}", why_rate, f"precision {precision}: {why}"]
    if training.init_from:
        reasons.append(f"beta {training.kl_beta_max:g} from the first step on: the weights are trained already")
    if CHANGED in profile.provenance:
        reasons.append(
            f"WARNING: the memory plan was fitted before {profile.provenance[CHANGED]} changed, so it may not fit and "
            f"nothing is predicted: fit it anew (--auto-fit, or {command_line('fit_memory')})"
        )
    decided = profile.with_plan(precision=precision, micro_batch=split.micro)
    schedule = Schedule(total, epoch, warmup, rate, training.cosine)
    return ResolvedRun(profile=decided, split=split, schedule=schedule, reasons=tuple(reasons))


def run_without_data(
    profile: Profile, micro_batch: int, accumulation: int = 1, total_steps: int = 100, rate: float = 1e-3
) -> ResolvedRun:
    """A run of one process at one learning rate, for those who trace or time steps; the precision must be decided."""
    total = micro_batch * accumulation
    profile = replace(profile.with_plan(micro_batch=micro_batch), training=replace(profile.training, total_batch=total))
    return ResolvedRun(
        profile=profile,
        split=BatchSplit(total, micro_batch, accumulation, 1),
        schedule=Schedule(total_steps, total_steps, 0, rate),
    )
