"""The learning rate: how it moves over a run, and where it starts for a given total batch."""

from __future__ import annotations

import math

from nvae_lowmem.errors import ConfigError

SMALLEST_SUGGESTED_RATE = 1e-3
"""The lower of the two rates (5e-3, 1e-3) that NVAE's authors advise for small batches."""
FINE_TUNING_SHARE = 0.1
"""Of the rate for random weights: what trained ones begin with."""


def learning_rate(
    step: int, *, peak: float, minimum: float, warmup_steps: int, steps_per_epoch: int, total_steps: int
) -> float:
    r"""Learning rate of optimiser step `step` (from 0): linear warm-up per step, then a cosine that moves per epoch.

        step <  W:   peak * ((step + 1) / W)
        step >= W:   minimum + (peak - minimum) * (1 + cos(pi * progress)) / 2
                     progress = min(1, (epoch - epoch_W) / max(1, epochs - 1 - epoch_W))

    with W = `warmup_steps`, epoch = floor(step / steps_per_epoch), epoch_W = floor(W / steps_per_epoch) and
    epochs = ceil(total_steps / steps_per_epoch). The first epoch after the warm-up is at `peak`, the last one of the
    run at `minimum` (the published schedule; published values: W = 5 epochs, peak 1e-2, minimum 1e-4).
    All arguments are counts of optimiser steps, not of micro-batches. Raises ValueError for counts that make no run.
    """
    if step < 0 or warmup_steps < 0 or steps_per_epoch < 1 or total_steps < 1:
        raise ValueError(f"no such schedule: {step=}, {warmup_steps=}, {steps_per_epoch=}, {total_steps=}")
    if step < warmup_steps:
        return warm_up(step, peak, warmup_steps)
    first_epoch = warmup_steps // steps_per_epoch
    last_epoch = math.ceil(total_steps / steps_per_epoch) - 1
    return cosine_at((step // steps_per_epoch - first_epoch) / max(1, last_epoch - first_epoch), peak, minimum)


def warm_up(step: int, peak: float, warmup_steps: int) -> float:
    """The learning rate of step `step` (from 0) of the warm-up, whose last one is at `peak`."""
    return peak * ((step + 1) / warmup_steps)


def cosine_at(progress: float, peak: float, minimum: float) -> float:
    """The learning rate on the way from `peak` (progress 0) to `minimum` (progress 1, and beyond)."""
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def suggest_learning_rate(total_batch: int, published_total_batch: int, published_rate: float) -> tuple[float, str]:
    """Peak learning rate for a total batch (images per optimiser step over all processes), and the reason to print.

    Rule: rate = published_rate * sqrt(total_batch / published_total_batch), at most the published rate and at least
    1e-3, to two digits. Square-root scaling keeps the noise of a run alike over batch sizes for adaptive optimisers
    (Malladi et al., arXiv 2205.10287, shown for Adam and RMSprop). For the published CIFAR-10 recipe (1e-2 at 256) it
    passes through the rates that NVAE's authors advise for small batches: 5e-3 at 64, 1e-3 at 2 to 3.

    Raises ConfigError if a batch is below 1 or the published rate is not above 0.
    """
    if total_batch < 1:
        raise ConfigError(f"training.total_batch = {total_batch} must be at least 1 image per optimiser step")
    if published_total_batch < 1 or not published_rate > 0:
        raise ConfigError(
            f"no learning rate can be derived from a published total batch of {published_total_batch} at "
            f"{published_rate:g}: set training.learning_rate"
        )
    published = f"the published {published_rate:g} is for a total batch of {published_total_batch}"
    if total_batch >= published_total_batch:
        return published_rate, f"learning rate {published_rate:g}: {published}, and this run's is {total_batch}"
    floor = min(SMALLEST_SUGGESTED_RATE, published_rate)
    scaled = published_rate * math.sqrt(total_batch / published_total_batch)
    rate = min(max(float(f"{scaled:.2g}"), floor), published_rate)
    sum_ = f"{published_rate:g} x sqrt({total_batch} / {published_total_batch}) = {scaled:.2g}"
    raised = f", raised to {floor:g}, the least advised for small batches" if rate == floor > scaled else ""
    return rate, f"learning rate {rate:g}: {published}; {sum_}{raised}"


def fine_tuning_rate(rate: float, why: str) -> tuple[float, str]:
    """Peak learning rate for weights that are trained already, and the reason to print; rate, why: for random ones."""
    lower = float(f"{FINE_TUNING_SHARE * rate:.2g}")
    return lower, (
        f"learning rate {lower:g}: {FINE_TUNING_SHARE:g} of the one for random weights, because these are trained and "
        f"large steps would undo that ({why})"
    )
