"""What other sizes of the model and the micro-batch would take and how fast they would be, beside the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from nvae_lowmem.memory.plan.candidates import PLAIN_VAE, scaled_groups
from nvae_lowmem.memory.plan.fit import Fit
from nvae_lowmem.memory.plan.overhead import Groups, Size

T = TypeVar("T")
_GROUP_ROWS, _BATCH_ROWS = 4, 6


@dataclass(frozen=True, kw_only=True)
class FrontierRow:
    """What one number of groups and one micro-batch take at best."""

    groups: Groups
    micro_batch: int
    peak_bytes: int
    """By the table, with what predictions were seen to exceed it by; of the chosen plan as predicted."""
    images_per_second: tuple[float, float] | None
    """Between these, estimated; None where they do not fit."""
    is_answer: bool
    """The plan that was chosen or, where nothing fits, the nearest miss."""


def frontier(found: Fit) -> list[FrontierRow]:
    """Rows over groups and micro-batches, most first, thinned out; the answer's own is always among them."""
    planner, answer = found.planner, found.chosen
    options = planner.group_options(False)
    if len(options) == 1:
        own = options[0]
        quarters = sorted({-(-own[0] * k // 4) for k in (1, 2, 3, 4)}, reverse=True)
        options = [groups for groups in (scaled_groups(own, n) for n in quarters) if groups != PLAIN_VAE]
    options = sorted({*_thin(options, _GROUP_ROWS), answer.groups}, reverse=True)
    batches = sorted({*_thin(planner.micro_batches(), _BATCH_ROWS), answer.micro_batch}, reverse=True)
    return [_row(found, Size(groups, micro_batch)) for groups in options for micro_batch in batches]


def _row(found: Fit, size: Size) -> FrontierRow:
    if size == found.chosen.size:
        best, fits, peak_bytes = found.chosen, found.fits, found.reserved_bytes
    else:
        fitting = found.planner.candidates(size, found.overhead)
        fits = bool(fitting)
        best = min(fitting, key=lambda c: c.seconds.total) if fits else found.planner.smallest_peak(size)
        peak_bytes = found.needed_bytes(best)
    return FrontierRow(
        groups=size.groups,
        micro_batch=size.micro_batch,
        peak_bytes=peak_bytes,
        images_per_second=best.time.images_per_second if fits else None,
        is_answer=size == found.chosen.size,
    )


def _thin(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
