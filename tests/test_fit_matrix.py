"""Fitted plans over every total and overhead that 4 GB cards were seen with: none runs out of memory.

The chosen plan's three steps are replayed with every bound of what no trace sees at its most, through an allocator that
has the budget's cap and no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from test_fit import CARD, profile_of, small_model, table_of

from nvae_lowmem.config.recipes import PUBLISHED_RECIPES, recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.hardware.budget import Budget, memory_fraction, usable_bytes
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, AllocatorStats, CachingAllocator, Replay
from nvae_lowmem.memory.catalogue.catalogue import fitted
from nvae_lowmem.memory.plan.block_costs import BlockTable
from nvae_lowmem.memory.plan.candidates import Candidate, Planner, Wishes
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.predict import predict as predicting
from nvae_lowmem.memory.predict.predict import predictor_for
from nvae_lowmem.memory.predict.untraced import entries, overlaid
from nvae_lowmem.units import GIB

TOTALS_GIB, OVERHEADS_GIB = (3.62, 3.81, 3.94, 4.00), (0.12, 0.40, 0.65, 1.2)
MATRIX = list(itertools.product(TOTALS_GIB, OVERHEADS_GIB))
SIZES_GIB = (8, 7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.5, 1)


def seen_card(card: Card, total_gib: float, overhead_gib: float) -> tuple[Card, Budget]:
    """The card with that total, of which so much is in use outside torch."""
    seen = replace(card, total_bytes_linux=int(total_gib * GIB))
    return seen, usable_bytes(seen, "linux", overhead_bytes=int(overhead_gib * GIB))


def replayed(found: Fit, card: Card, budget: Budget) -> tuple[Replay, AllocatorStats]:
    """Three steps of the chosen plan with all bounds at their most, through an allocator under the cap."""
    c = found.chosen
    trace = predicting._traced(c.profile, c.micro_batch, c.accumulation)
    held = entries(c.profile, trace, c.accumulation, card, budget.context_bytes)
    most = overlaid(trace, [e for e in held if e.when in ("always", "backward", "update", "convolution")])
    share = memory_fraction(budget.cap_bytes, budget.context_bytes, budget.total_bytes)
    allocator = CachingAllocator(AllocatorSettings.from_string(""), budget.total_bytes, budget.context_bytes, share)
    return allocator.replay(predicting._three_steps(most)), allocator.stats


def faster_and_larger(found: Fit, profile: Profile, card: Card, table: BlockTable) -> Iterator[Candidate]:
    """Plans with a larger micro-batch that the planner would call faster if the chosen one's overhead were enough."""
    c, p = found.chosen, found.prediction
    assert p is not None
    decided = profile.with_plan(precision=c.profile.plan.precision, micro_batch=0)
    planner = Planner(profile=decided, card=card, budget=found.budget, wishes=Wishes(), table=table)
    planner.set_aside(c, max(0, found.reserved_bytes - c.peak_bytes), max(0, p.host_bytes - c.host_bytes))
    for micro_batch in planner.micro_batches():
        if micro_batch > c.micro_batch:
            yield from (d for d in planner.candidates(c.groups, micro_batch) if d.seconds.total < c.seconds.total)


# ---- a wide model of few blocks: 0.3 to 10 GiB -----------------------------------------------------------------------

WIDE = profile_of(
    small_model(image_size=64, groups=2, channels_encoder=768, channels_decoder=768, cells_encoder=1, cells_decoder=1),
    total_batch=8,
)


def wide_fit(card: Card, budget: Budget) -> Fit:
    return fit(WIDE, card, budget, Wishes(), predictor_for(card, budget), table=table_of(WIDE.model))


@pytest.mark.parametrize(("total_gib", "overhead_gib"), MATRIX)
def test_no_fitted_plan_runs_out_of_memory(total_gib: float, overhead_gib: float) -> None:
    card, budget = seen_card(CARD, total_gib, overhead_gib)
    found = wide_fit(card, budget)
    assert found.fits
    replay, stats = replayed(found, card, budget)
    assert replay.oom is None
    assert stats.peak_reserved_bytes <= budget.cap_bytes
    if found.reserved_bytes < 0.95 * budget.cap_bytes:
        assert not list(faster_and_larger(found, WIDE, card, table_of(WIDE.model)))


def assert_explained(found: Fit) -> None:
    cap = found.budget.cap_bytes
    if found.prediction is not None:
        assert found.prediction.fits(cap) and found.reserved_bytes <= cap
    else:
        assert found.reserved_bytes > cap
        assert any(line.startswith("nearest miss") for line in found.refused)
        assert any(line.startswith("needed: a card that leaves") for line in found.refused)


# ---- the published recipes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_no_fitted_plan_of_a_published_recipe_runs_out_of_memory(name: str) -> None:
    profile, card = recipe(name), find_card("gtx-1050-ti")
    for total_gib, overhead_gib in MATRIX:
        seen, budget = seen_card(card, total_gib, overhead_gib)
        found = fitted(profile, seen, budget)
        where = f"{name}, {total_gib} GiB with {overhead_gib} GiB in use"
        assert found.fits, where
        assert replayed(found, seen, budget)[0].oom is None, where
        assert found.chosen.micro_batch == profile.training.total_batch, where
        print(f"{where}: {found.reserved_bytes / budget.cap_bytes:.1%} of the cap")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_a_published_recipe_has_a_plan_at_every_size_or_says_what_is_missing(name: str) -> None:
    for size_gib in SIZES_GIB:
        found = fitted(recipe(name), find_card("4g"), usable_bytes(None, "linux", int(size_gib * GIB)))
        assert_explained(found)
