"""Fitted plans over every total and overhead that 4 GB cards were seen with: none runs out of memory.

The chosen plan is predicted anew with every bound of what no trace sees at its most, under the budget's cap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from planner_cases import CARD, profile_of, small_model, table_of

from nvae_lowmem.config.recipes import PUBLISHED_RECIPES, recipe
from nvae_lowmem.hardware.budget import Budget, usable_bytes
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.catalogue.catalogue import fitted
from nvae_lowmem.memory.plan.candidates import Candidate, Wishes
from nvae_lowmem.memory.plan.explain import refusals
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.plan.overhead import OverheadModel, Size
from nvae_lowmem.memory.predict.predict import Prediction, predict, predictor_for
from nvae_lowmem.units import GIB

TOTALS_GIB, OVERHEADS_GIB = (3.62, 3.81, 3.94, 4.00), (0.12, 0.40, 0.65, 1.2)
MATRIX = list(itertools.product(TOTALS_GIB, OVERHEADS_GIB))
SIZES_GIB = (8, 7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.5, 1)


def seen_card(card: Card, total_gib: float, overhead_gib: float) -> tuple[Card, Budget]:
    """The card with that total, of which so much is in use outside torch."""
    seen = replace(card, total_bytes_linux=int(total_gib * GIB))
    return seen, usable_bytes(seen, "linux", overhead_bytes=int(overhead_gib * GIB))


def at_its_most(found: Fit, card: Card) -> Prediction:
    """The chosen plan's prediction as if a card had measured every bound of what no trace sees at its most."""
    c, p = found.chosen, found.prediction
    assert p is not None
    measured = {entry.name: entry for entry in p.overlay if entry.is_bound}
    assert measured
    return predict(c.profile, c.micro_batch, c.accumulation, card, found.budget, calibration=measured)


def faster_and_larger(found: Fit) -> Iterator[Candidate]:
    """Plans with a larger micro-batch that the planner would call faster if the chosen one's overhead were enough."""
    c, p = found.chosen, found.prediction
    assert p is not None
    overhead = OverheadModel(found.budget.cap_bytes)
    overhead.observe(c.size, c.taken, p)
    for micro_batch in found.planner.micro_batches():
        if micro_batch > c.micro_batch:
            candidates = found.planner.candidates(Size(c.groups, micro_batch), overhead)
            yield from (d for d in candidates if d.seconds.total < c.seconds.total)


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
    most = at_its_most(found, card)
    assert most.oom is None and most.reserved_peak_bytes <= budget.cap_bytes
    if found.reserved_bytes < 0.95 * budget.cap_bytes:
        assert not list(faster_and_larger(found))


def assert_explained(found: Fit) -> None:
    cap = found.budget.cap_bytes
    if found.prediction is not None:
        assert found.prediction.fits(cap) and found.reserved_bytes <= cap
    else:
        assert found.reserved_bytes > cap
        assert any(line.startswith("nearest miss") for line in refusals(found))
        assert any(line.startswith("needed: a card that leaves") for line in refusals(found))


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
        assert at_its_most(found, seen).oom is None, where
        assert found.chosen.micro_batch == profile.training.total_batch, where
        print(f"{where}: {found.reserved_bytes / budget.cap_bytes:.1%} of the cap")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_a_published_recipe_has_a_plan_at_every_size_or_says_what_is_missing(name: str) -> None:
    for size_gib in SIZES_GIB:
        found = fitted(recipe(name), find_card("4g"), usable_bytes(None, "linux", int(size_gib * GIB)))
        assert_explained(found)
