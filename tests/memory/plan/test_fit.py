"""What fit makes of the search, the table and the predictor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from planner_cases import (
    CARD,
    GIB,
    MIB,
    RATES,
    SIX_BLOCKS,
    WIDE,
    mixed_assignments,
    priced,
    run,
    table_of,
    traced,
)

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import usable_bytes
from nvae_lowmem.memory.plan.candidates import ALIKE, Wishes
from nvae_lowmem.memory.plan.explain import planned, reasons, refusals
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.plan.frontier import frontier
from nvae_lowmem.memory.plan.roofline import RETRY_SECONDS
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.memory.trace.training import trace_training


def test_no_assignment_that_fits_with_room_to_spare_is_faster_than_the_chosen_one() -> None:
    profile = SIX_BLOCKS.with_plan(offload_optimizer=True)
    named = table_of(profile.model).choices((1,), 16, RATES, gradients_stay=False)
    seconds = {name: {c.keep: c.seconds for c in row} for name, row in named}
    peaks = {}
    for keep in ("all", "input"):
        peaks[keep] = trace_training(profile.with_plan(keep=keep), 16, 1, 1).peak().nbytes
    cap = (peaks["all"] + 2 * peaks["input"]) // 3  # between everything kept and everything recomputed
    found = run(profile, cap, traced, min_micro_batch=16)
    assert found.fits and found.reserved_bytes <= cap
    beaten = 0
    for keeps in mixed_assignments(list(seconds), 20):
        if sum(seconds[name][keep] for name, keep in keeps.items()) < found.chosen.assignment.seconds * (1 - 1e-9):
            trace = trace_training(profile.with_plan(keep_blocks=keeps), 16, 1, 1)
            assert trace.peak().nbytes > 0.97 * cap, keeps
            beaten += 1
    assert beaten  # some were faster, and none of them fits


def test_what_the_predictor_adds_to_the_table_is_learnt() -> None:
    calls: list[int] = []

    def greedy(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
        found = priced(profile, micro_batch, accumulation, share=1.4)
        calls.append(found.reserved_peak_bytes)
        return found

    found = run(WIDE, 3 * GIB, greedy)
    assert found.fits and found.reserved_bytes <= 3 * GIB
    assert 1 < len(calls) <= 5
    assert found.reserved_bytes > 0.8 * 3 * GIB  # and not more than that is left free


def test_room_that_one_micro_batch_cannot_use_is_not_lost_to_the_others() -> None:
    """The largest micro-batch takes far more than the table says and fails; smaller ones do not and get their room."""
    cap = 2 * GIB
    whole = run(WIDE, cap).chosen.micro_batch

    def fragmented(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
        return priced(profile, micro_batch, accumulation, share=1.6 if micro_batch >= whole else 1.06)

    found = run(WIDE, cap, fragmented)
    assert found.fits and found.reserved_bytes > 0.9 * cap


def test_a_plan_without_retries_is_looked_for_and_one_with_them_says_how_many() -> None:
    cap = 2 * GIB

    def full(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
        found = priced(profile, micro_batch, accumulation)
        count = 3 if found.reserved_peak_bytes > 0.9 * cap else 0
        return replace(found, retries=count, run_retries=count)

    def always(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
        return replace(priced(profile, micro_batch, accumulation), retries=2, run_retries=5)

    whole, calm, restless = run(WIDE, cap), run(WIDE, cap, full), run(WIDE, cap, always)
    assert whole.reserved_bytes > 0.9 * cap
    assert calm.prediction is not None and calm.prediction.retries == 0 and calm.reserved_bytes > 0.8 * cap
    assert calm.chosen.seconds.retries == 0 and "give back" not in "\n".join(reasons(calm))
    assert restless.prediction is not None and restless.prediction.retries == 2
    assert any(
        "give back its cache 5 times in the first steps and 2 times in each" in line for line in reasons(restless)
    )
    assert restless.chosen.seconds.total == pytest.approx(
        restless.chosen.seconds.with_retries(0).total + 2 * RETRY_SECONDS
    )
    assert planned(restless, "linux", "test").provenance["predicted_retries"] == 2


@pytest.mark.parametrize("cap_bytes", [4 * GIB, 700 * MIB, 100 * MIB])
def test_the_answers_row_is_always_in_the_frontier(cap_bytes: int) -> None:
    found = run(WIDE, cap_bytes)
    (row,) = [row for row in frontier(found) if row.is_answer]
    assert (row.groups, row.micro_batch) == found.chosen.size
    assert row.peak_bytes == found.reserved_bytes and (row.images_per_second is not None) == found.fits
    assert all(row.images_per_second is None or row.peak_bytes <= cap_bytes for row in frontier(found))


@pytest.fixture(scope="module")
def shrinking() -> list[tuple[str, Fit]]:
    out = []
    for size in ("8G", "4G", "3G", "2G", "1.5G", "1G", "512M"):
        budget = usable_bytes(None, "linux", int(float(size[:-1]) * (GIB if size.endswith("G") else MIB)))
        out.append((size, fit(WIDE, CARD, budget, Wishes(), priced, table=table_of(WIDE.model))))
    return out


def test_less_and_less_memory_is_always_answered_with_a_plan_or_with_what_is_missing(
    shrinking: list[tuple[str, Fit]],
) -> None:
    assert shrinking[0][1].fits and not shrinking[-1][1].fits
    for size, found in shrinking:
        if found.prediction is not None:
            assert found.prediction.fits(found.budget.cap_bytes), size
            assert found.chosen.micro_batch * found.chosen.accumulation == 16
        else:
            text = "\n".join(refusals(found))
            assert "nearest miss" in text and "needed: a card that leaves" in text, size
            assert found.reserved_bytes > found.budget.cap_bytes


def test_less_memory_never_gives_more_groups_nor_more_speed_at_the_same_groups(
    shrinking: list[tuple[str, Fit]],
) -> None:
    plans = [found.chosen for _, found in shrinking if found.fits]
    assert len({plan.assignment.keeps for plan in plans}) > 2
    for more, less in itertools.pairwise(plans):
        assert sum(less.groups) <= sum(more.groups)
        if less.groups == more.groups:
            # what counts as equally fast, and what a good enough plan may leave unused
            assert less.images_per_second <= more.images_per_second * ALIKE * 1.03


def test_wishes_order_the_plans() -> None:
    cap = 2 * GIB
    fast, batch, groups = (run(WIDE, cap, prefer=p, groups=(1, 4)).chosen for p in ("speed", "batch", "groups"))
    assert batch.micro_batch >= max(fast.micro_batch, groups.micro_batch)
    assert groups.groups == max(c.groups for c in (fast, batch, groups)) == fast.groups
    assert ALIKE * fast.images_per_second >= groups.images_per_second
    least = run(WIDE, cap, min_micro_batch=8).chosen
    assert least.micro_batch >= 8
    assert run(WIDE, cap, groups=(2, 2)).chosen.groups == (2,)


def test_host_memory_is_a_limit_of_its_own() -> None:
    free = run(WIDE, GIB)
    assert free.prediction is not None and free.prediction.host_bytes > 0
    less = free.prediction.host_bytes - 1
    tight = run(WIDE, GIB, host_mem_bytes=less)
    assert tight.prediction is not None and tight.prediction.host_bytes <= less
    assert tight.chosen.seconds.total > free.chosen.seconds.total or tight.chosen.micro_batch != free.chosen.micro_batch
    none = run(WIDE, GIB, host_mem_bytes=MIB)
    assert not none.fits
    assert any("needed: --host-mem" in line for line in refusals(none))


def test_deepspeed_means_stage_two_with_the_optimizer_on_the_host() -> None:
    plan = run(WIDE, 4 * GIB, engine="deepspeed").chosen.profile.plan
    assert (plan.engine, plan.zero_stage, plan.offload_optimizer) == ("deepspeed", 2, True)


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        ({"min_micro_batch": 17}, "--min-micro-batch 17"),
        ({"min_micro_batch": 0}, "--min-micro-batch 0"),
        ({"groups": (5, 2)}, "--groups 5..2"),
        ({"groups": (0, 2)}, "--groups 0..2"),
    ],
)
def test_impossible_wishes_are_refused_by_name(wishes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run(WIDE, GIB, **wishes)
