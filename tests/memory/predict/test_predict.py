"""Predictions: the replayed steps, margins, caps, what the host holds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import usable_bytes
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, CachingAllocator
from nvae_lowmem.memory.predict import predict as predicting
from nvae_lowmem.memory.predict.predict import as_text, predict
from nvae_lowmem.memory.predict.untraced import (
    MeasuredEntry,
)
from nvae_lowmem.memory.trace.events import Trace
from nvae_lowmem.memory.trace.inference import trace_generation
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import GIB, MIB
from profiles import budget_of, profile_of

NOTHING = {
    name: MeasuredEntry(0, "test")
    for name in ("cublas-workspaces", "cublaslt-workspace", "cudnn-workspace", "reductions")
}
OFFLOADED = {"keep": "input", "offload_optimizer": True, "precision": "fp16"}


@pytest.mark.parametrize("plan", [{"keep": "all"}, OFFLOADED])
@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_the_prediction_is_a_whole_run_through_the_allocator(plan: dict[str, Any], settings: str) -> None:
    """Set-up, two steps, what is between steps, a step, and again what is between steps."""
    profile = profile_of(**plan)
    found = predict(profile, 2, settings=settings, calibration=NOTHING)
    steps, between = trace_training(profile, 2, steps=3), trace_generation(profile, "between steps", 2)
    start, offset = between.marks["setup done"], len(steps.allocations)
    made = {n for n, a in enumerate(between.allocations) if a.born >= start}
    pause = [(op, n + offset) for op, n in between.requests(start) if n in made]
    last = steps.marks["step 3"]
    allocator = CachingAllocator(AllocatorSettings.from_string(settings), 4 * GIB)
    allocator.replay([*steps.requests(0, last), *pause, *steps.requests(last), *pause])
    assert found.allocated_peak_bytes == allocator.stats.peak_allocated_bytes
    assert found.reserved_peak_bytes == allocator.stats.peak_reserved_bytes
    assert (found.margin_bytes, found.retries, found.run_retries, found.oom) == (0, 0, 0, None)


def test_bounds_widen_the_margin_and_leave_the_prediction() -> None:
    sure, unsure = (
        predict(profile_of(), 2, calibration=c)
        for c in (NOTHING, {name: NOTHING[name] for name in ("cublas-workspaces", "cublaslt-workspace")})
    )
    assert unsure.reserved_peak_bytes == sure.reserved_peak_bytes
    assert unsure.margin_bytes >= 64 * MIB and sure.margin_bytes == 0
    assert not unsure.fits(unsure.reserved_peak_bytes + unsure.margin_bytes - 1)
    assert unsure.fits(unsure.reserved_peak_bytes + unsure.margin_bytes)


def test_known_entries_are_in_the_peak_and_have_their_owner() -> None:
    others = {name: entry for name, entry in NOTHING.items() if name != "cublas-workspaces"}
    bare, held = (predict(profile_of(), 2, calibration=calibration) for calibration in (NOTHING, others))
    cublas = next(e.nbytes for e in held.overlay if e.name == "cublas-workspaces")
    assert held.allocated_peak_bytes == bare.allocated_peak_bytes + cublas
    assert held.peak.by_category["buffer"] == held.peak.by_block["cublas-workspaces"] == cublas
    assert held.peak.nbytes == held.allocated_peak_bytes


def test_the_timeline_keeps_the_peak_and_the_order() -> None:
    found = predict(profile_of(), 2)
    events = [event for event, _ in found.timeline]
    assert events == sorted(set(events)) and 100 < len(events) < 900
    assert max(sum(moment.values()) for _, moment in found.timeline) == found.peak.nbytes


def test_a_cap_below_the_need_names_the_operation_that_fails() -> None:
    free = predict(profile_of(), 64)
    capped = predict(profile_of(), 64, budget=budget_of(free.margin_bytes + 2 * MIB))
    assert capped.oom is not None and "aten::" in capped.oom and "cannot allocate" in capped.oom
    assert not capped.fits(4 * GIB)
    # what it would take is told all the same; the smaller workspaces of a capped run are no concern of the model's
    assert capped.peak.by_category["temporary"] == free.peak.by_category["temporary"]
    assert predict(profile_of(), 64, budget=budget_of(GIB)).oom is None


def test_known_traces_give_further_micro_batches_without_another(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def counting(profile: Profile, micro_batch: int, *args: Any) -> Trace:
        traced.append(micro_batch)
        return trace_training(profile, micro_batch, *args)

    def seeded(seed: int, **plan: Any) -> Profile:
        """A seed that no other test predicts: it changes no byte, but traces are kept by it."""
        profile = profile_of(**{**OFFLOADED, **plan})
        return replace(profile, training=replace(profile.training, seed=seed))

    monkeypatch.setattr(predicting, "trace_training", counting)
    found = [predict(seeded(1001), n, calibration=NOTHING) for n in (2, 3, 5, 3)]
    assert traced == [2, 3] and found[1] == found[3]
    assert predict(seeded(1002), 5, calibration=NOTHING) == found[2]
    assert traced == [2, 3, 5]
    predict(seeded(1001, keep="all"), 5)
    assert traced == [2, 3, 5, 5]  # another plan is another trace


def test_an_undecided_precision_is_the_cards() -> None:
    profile = profile_of(precision="auto")
    assert predict(profile, 2).precision == "fp16"
    assert predict(profile, 2, card=find_card("rtx-3050-laptop")).precision == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"micro_batch": 0}, "micro-batch 0"),
        ({"micro_batch": 2, "accumulation": 0}, "accumulation 0"),
        ({"micro_batch": 2, "settings": "max_split_size_mb:1"}, "max_split_size_mb"),
    ],
)
def test_what_cannot_be_predicted_says_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(profile_of(), **arguments)


def test_the_prediction_becomes_json_and_a_table() -> None:
    found = predict(profile_of(**OFFLOADED), 2, budget=budget_of(GIB))
    table = json.loads(json.dumps(found.to_json()))
    assert table["reserved_peak_bytes"] == found.reserved_peak_bytes
    assert table["peak"]["block"] == found.peak.block and len(table["timeline"]) == len(found.timeline)
    text = as_text(found, GIB)
    assert "fits 1.00 GiB" in text and found.peak.operation in text
    assert all(entry.name in text for entry in found.overlay)


def test_the_host_holds_what_the_plan_sends_there() -> None:
    n = sum(trace_training(profile_of(), 2, steps=1).parameter_bytes)
    here = predict(profile_of(), 2)
    there, pinned = (predict(profile_of(**OFFLOADED, pin_memory=pin), 2) for pin in (False, True))
    assert 4 * n <= there.host_bytes - here.host_bytes < 4 * n + 2048  # and the numbers of the loss scale
    assert there.pinned_bytes == 0 and pinned.pinned_bytes >= 2 * n
    assert pinned.host_bytes == there.host_bytes - 2 * n + pinned.pinned_bytes
    parked = predict(profile_of(**{**OFFLOADED, "keep": "host"}), 32)
    assert 0 < parked.pinned_bytes < parked.host_bytes


def test_a_budget_decides_the_cap_that_the_steps_run_under() -> None:
    card = find_card("gtx-970")
    budget = usable_bytes(card, "linux")
    found = predict(profile_of(**OFFLOADED), 2, card=card, budget=budget)
    assert found.context_bytes == budget.context_bytes
    assert found.fits(budget.cap_bytes) and found.oom is None
