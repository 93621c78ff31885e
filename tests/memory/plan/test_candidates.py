"""Plans as profiles: policies by exception and prefix, groups in proportion."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import CARD, GIB, TWO_SCALES, WIDE, budget_of, run, table_of

from nvae_lowmem.config.sections import KEEPS, MemoryPlan, Profile
from nvae_lowmem.memory.plan.candidates import Candidate, Planner, Wishes, fastest_of, named_keeps, scaled_groups
from nvae_lowmem.memory.plan.overhead import OverheadModel, Size
from nvae_lowmem.memory.predict.predict import predict

names = st.lists(
    st.sampled_from(["stem", "top", "head", *(f"{t}_{s}_{i}" for t in ("enc", "dec") for s in "01" for i in range(3))]),
    min_size=1, unique=True,
)  # fmt: skip


@given(names, st.data())
def test_policies_survive_being_written_by_exception_and_prefix(blocks: list[str], data: st.DataObject) -> None:
    keeps = data.draw(st.lists(st.sampled_from(KEEPS), min_size=len(blocks), max_size=len(blocks)))
    default, exceptions = named_keeps(blocks, keeps)
    plan = MemoryPlan(keep=default, keep_blocks=exceptions)
    assert [plan.keep_of(name) for name in blocks] == keeps


def test_groups_shrink_in_proportion_and_never_to_nothing() -> None:
    assert scaled_groups((20, 10, 5), 20) == (20, 10, 5)
    assert scaled_groups((20, 10, 5), 8) == (8, 4, 2)
    assert scaled_groups((16, 8, 4, 4, 4), 1) == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "plan",
    [
        {"engine": "torch"},
        {"engine": "torch", "offload_optimizer": True},
        {"engine": "torch", "offload_optimizer": True, "pin_memory": True},
        {"engine": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    ],
    ids=lambda plan: "-".join(map(str, plan.values())),
)
def test_the_planner_and_the_predictor_count_the_same_host_memory(plan: dict, accumulation: int) -> None:
    profile = TWO_SCALES.with_plan(**plan)
    for training in ({}, {"ema_on_host": False}, {"ema_decay": 0.0}):
        own = replace(profile, training=replace(profile.training, total_batch=4 * accumulation, **training))
        budget = budget_of(4 * GIB)
        planner = Planner(
            profile=own, card=CARD, budget=budget, wishes=Wishes(engine=plan["engine"]), table=table_of(own.model)
        )
        same = [c for c in planner.candidates(Size((3, 2), 4), OverheadModel(4 * GIB)) if placed_alike(c, own)]
        assert same
        for candidate in same:
            # torch's Adamax counts the steps of each parameter on the host; besides, a number or two
            steps = 4 * len(table_of(own.model).parameter_elements((3, 2))) + 64
            assert 0 <= predict(candidate.profile, 4, accumulation).host_bytes - candidate.host_bytes <= steps


def placed_alike(candidate: Candidate, profile: Profile) -> bool:
    return candidate.profile.plan.offload_optimizer == profile.plan.offload_optimizer


def test_of_equally_fast_plans_of_one_size_the_one_without_retries_is_taken() -> None:
    plan = run(WIDE, 2 * GIB).chosen
    retrying = replace(plan, seconds=plan.seconds.with_retries(1))
    slow = replace(plan, seconds=replace(plan.seconds, card=plan.seconds.card * 1.04))
    assert retrying.seconds.total > plan.seconds.total
    quick_retry = replace(retrying, seconds=replace(retrying.seconds, card=0.9 * plan.seconds.card, retries=1e-9))
    assert fastest_of([retrying, plan]) is plan
    assert fastest_of([replace(plan, seconds=replace(plan.seconds, retries=1e-9)), slow]) is slow
    assert fastest_of([quick_retry, slow]) is quick_retry  # far faster all the same
