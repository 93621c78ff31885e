"""The planner: the search against brute force, the table of block costs against traces, and what fit makes of both."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import KEEPS, Keep, MemoryPlan, Profile, TrainConfig
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget, usable_bytes
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.plan import search as fit_search
from nvae_lowmem.memory.plan.block_costs import BlockTable, Choice, record_blocks
from nvae_lowmem.memory.plan.candidates import ALIKE, Wishes, always_bytes, host_bytes, named_keeps, scaled_groups
from nvae_lowmem.memory.plan.fit import Fit, fit
from nvae_lowmem.memory.plan.roofline import rates_of
from nvae_lowmem.memory.plan.search import Assignment, fastest, least_peak
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.memory.trace.events import Peak
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.model.nvae import NVAE

CARD = find_card("rtx-3050-ti-laptop")  # computes in bf16
RATES = rates_of(CARD)
MIB, GIB = 1 << 20, 1 << 30


def small_model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "image_size": 16, "bits": 1, "channels_encoder": 8, "channels_decoder": 8, "latents": 4,
        "scales": 1, "groups": 1, "adaptive": False,
        "preprocess_blocks": 1, "preprocess_cells": 1, "postprocess_blocks": 1, "postprocess_cells": 1,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def profile_of(model: ModelConfig, total_batch: int = 16, **plan: Any) -> Profile:
    plan = {"precision": "bf16", **plan}
    return Profile(name="small", model=model, training=TrainConfig(total_batch=total_batch), plan=MemoryPlan(**plan))


SIX_BLOCKS = profile_of(small_model())  # a plain VAE: stem, pre_0_0, top, dec_0_0, post_0_0, head
TWO_SCALES = profile_of(small_model(scales=2, groups_per_scale=(3, 2), cells_encoder=1, cells_decoder=1))
# few blocks, but wide ones: what it takes lies between 0.3 GiB and 10 GiB
WIDE = profile_of(
    small_model(image_size=64, groups=4, channels_encoder=512, channels_decoder=512, cells_encoder=1, cells_decoder=1),
    total_batch=16,
)


@functools.cache
def table_of(model: ModelConfig) -> BlockTable:
    return record_blocks(profile_of(model))


def budget_of(cap_bytes: int) -> Budget:
    return Budget(cap_bytes=cap_bytes, total_bytes=2 * cap_bytes, context_bytes=0, reason="for the test")


# ---- the search ------------------------------------------------------------------------------------------------------

choices = st.builds(
    Choice, st.sampled_from(KEEPS), st.integers(-20, 40), st.integers(0, 60), st.integers(1, 30).map(float)
)
row_lists = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=6)


def every(rows: Sequence[Sequence[Choice]]) -> list[Assignment]:
    return [Assignment(picked) for picked in itertools.product(*rows)]


@settings(max_examples=150, deadline=None)
@given(row_lists, st.integers(0, 200))
def test_the_search_finds_what_trying_everything_finds(rows: list[list[Choice]], room: int) -> None:
    fitting = [a for a in every(rows) if a.peak_bytes <= room]
    found = fastest(rows, room)
    if not fitting:
        assert found is None
    else:
        assert found is not None and found.peak_bytes <= room
        assert found.seconds == min(a.seconds for a in fitting)


@settings(max_examples=100, deadline=None)
@given(row_lists)
def test_the_least_peak_is_the_least_of_all_assignments(rows: list[list[Choice]]) -> None:
    assert least_peak(rows).peak_bytes == min(a.peak_bytes for a in every(rows))


@settings(max_examples=50, deadline=None)
@given(row_lists, st.integers(0, 200))
def test_thinning_the_states_out_never_loses_that_something_fits(rows: list[list[Choice]], room: int) -> None:
    whole = fastest(rows, room)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_search, "MOST_STATES", 2)
        thinned = fastest(rows, room)
    assert (whole is None) == (thinned is None)
    if whole is not None and thinned is not None:
        assert thinned.peak_bytes <= room
        assert thinned.seconds >= whole.seconds


def test_on_a_real_model_of_six_blocks_the_search_equals_trying_all_4096_assignments() -> None:
    named = table_of(SIX_BLOCKS.model).choices((1,), 16, RATES, gradients_stay=False)
    assert len(named) == 6
    rows = [row for _, row in named]
    priced = sorted({(a.peak_bytes, a.seconds) for a in every(rows)})
    peaks = [peak for peak, _ in priced]
    for room in (peaks[0] - 1, *peaks[:: len(peaks) // 12], peaks[-1]):
        found = fastest(rows, room)
        possible = [seconds for peak, seconds in priced if peak <= room]
        assert (found is None) == (not possible)
        if found is not None:
            assert found.seconds == pytest.approx(min(possible), rel=1e-12)


# ---- the table of block costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(5,), (3, 2), (1, 1)])
def test_the_table_knows_the_blocks_of_a_model_with_any_number_of_groups(groups: tuple[int, ...]) -> None:
    model = small_model(scales=len(groups), groups_per_scale=groups)
    like = small_model(scales=len(groups), groups_per_scale=tuple(2 for _ in groups))
    table = record_blocks(profile_of(like), keeps=("all",))
    network = NVAE(model)
    assert [b.name for b in table.blocks(groups)] == [n for n in network.block_names() if n != "start"]
    parameters = table.count(table.parameters, groups)
    assert parameters == sum(p.numel() for p in network.parameters())
    states = [*network.parameters(), *network.buffers()]
    assert table.count(table.state_bytes, groups) == sum(-(-t.nbytes // 512) * 512 for t in states)


def mixed_assignments(names: Sequence[str], count: int) -> list[dict[str, Keep]]:
    drawn = random.Random(0)
    uniform: list[dict[str, Keep]] = [dict.fromkeys(names, keep) for keep in KEEPS]
    return uniform + [{name: drawn.choice(KEEPS) for name in names} for _ in range(count)]


@pytest.mark.parametrize("offload", [True, False], ids=["offloaded", "on the card"])
def test_the_table_prices_mixed_policies_as_a_trace_of_the_whole_model_does(offload: bool) -> None:
    images, groups = 64, TWO_SCALES.model.scale_groups
    table = table_of(TWO_SCALES.model)
    named = table.choices(groups, images, RATES, gradients_stay=not offload)
    always = always_bytes(table, groups, MemoryPlan(offload_optimizer=offload), 1)
    drawn = mixed_assignments([name for name, _ in named], 2)
    for keeps in drawn if offload else drawn[-2:]:
        picked = Assignment(tuple(next(c for c in row if c.keep == keeps[name]) for name, row in named))
        plan = MemoryPlan(precision="bf16", offload_optimizer=offload, keep_blocks=keeps)
        trace = trace_training(replace(TWO_SCALES, plan=plan), images, 1, 1 if offload else 2)
        # rather too much than too little: what a parked input's neighbours fetch ahead is counted at its most
        assert 0.98 < (always + picked.peak_bytes) / trace.peak().nbytes < 1.05, keeps


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


# ---- fit -------------------------------------------------------------------------------------------------------------


def predicted(profile: Profile, peak: Peak, reserved_bytes: int, host: int) -> Prediction:
    return Prediction(
        micro_batch=profile.plan.micro_batch, accumulation=1, precision="bf16", peak=peak, overlay=(), oom=None,
        allocated_peak_bytes=peak.nbytes, reserved_peak_bytes=reserved_bytes, timeline=(), host_bytes=host,
        pinned_bytes=0, context_bytes=0, init_peak_bytes=0, margin_bytes=0, retries=0,
    )  # fmt: skip


def traced(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
    """A predictor without fragmentation, workspaces and margin: the traced peak."""
    trace = trace_training(profile, micro_batch, min(accumulation, 2), 2)
    return predicted(profile, trace.peak(), trace.peak().nbytes, trace.host_bytes())


def priced(profile: Profile, micro_batch: int, accumulation: int, share: float = 1.06) -> Prediction:
    """A cheap predictor: `share` of what the table says of this very plan, and some libraries' 40 MiB."""
    plan, groups, table = profile.plan, profile.model.scale_groups, table_of(WIDE.model)
    stay = not plan.offload_optimizer and accumulation == 1
    named = table.choices(groups, micro_batch, RATES, gradients_stay=stay)
    picked = Assignment(tuple(next(c for c in row if c.keep == plan.keep_of(name)) for name, row in named))
    peak = always_bytes(table, groups, plan, accumulation) + picked.peak_bytes
    parameters = table.count(table.parameters, groups)
    host = host_bytes(plan, accumulation, parameters, profile.training.ema_on_host) + picked.host_bytes
    return predicted(profile, Peak(peak, 0, "", "", "", {}, {}), int(share * peak) + 40 * MIB, host)


def run(profile: Profile, cap_bytes: int, predictor: Any = priced, **wishes: Any) -> Fit:
    table = table_of(profile.model)
    return fit(profile, CARD, budget_of(cap_bytes), Wishes(**wishes), predictor, table=table)


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
    assert found.reserved_bytes > 0.8 * 3 * GIB  # and not more than that is set aside


def test_room_that_one_micro_batch_cannot_use_is_not_lost_to_the_others() -> None:
    """The largest micro-batch takes far more than the table says and fails; smaller ones do not and get their room."""
    cap = 2 * GIB
    whole = run(WIDE, cap).chosen.micro_batch

    def fragmented(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
        return priced(profile, micro_batch, accumulation, share=1.6 if micro_batch >= whole else 1.06)

    found = run(WIDE, cap, fragmented)
    assert found.fits and found.reserved_bytes > 0.9 * cap


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
            text = "\n".join(found.refused)
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
    assert not tight.fits or (tight.prediction is not None and tight.prediction.host_bytes <= less)
    none = run(WIDE, GIB, host_mem_bytes=MIB)
    assert not none.fits
    assert any("needed: --host-mem" in line for line in none.refused)


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
