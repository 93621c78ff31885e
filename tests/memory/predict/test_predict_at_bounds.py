"""A plan close to the cap: it fits if its steps run with everything that is unknown at its most."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from nvae_lowmem.hardware.budget import Budget, find_card
from nvae_lowmem.memory.allocator.allocator import CHECKPOINT, FREE_ID, AllocatorSettings, CachingAllocator, Replay
from nvae_lowmem.memory.predict import predict as predicting
from nvae_lowmem.memory.predict.predict import predict, predictor_for
from nvae_lowmem.memory.predict.untraced import flattened_weights
from nvae_lowmem.memory.predict.whole_run import WholeRun
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import GIB, MIB
from profiles import budget_of, profile_of


@pytest.mark.parametrize("in_pieces", [True, False])
def test_free_memory_in_pieces_is_no_room_for_the_unknown(in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps run below the cap less the margin; whether they also do with the unknown allocated decides."""
    real = WholeRun.replays
    free = predict(profile_of(), 4, budget=budget_of(3 * GIB))  # a cap makes cuBLAS's workspaces smaller
    cap = free.reserved_peak_bytes + free.margin_bytes - 1
    asked: list[int] = []

    def replays(
        run: WholeRun, settings: Any, budget: Budget | None = None, margin_bytes: int = 0
    ) -> tuple[Replay, ...]:
        if budget is None:
            return real(run, settings)
        asked.append(margin_bytes)
        return real(run, settings, budget_of(MIB if margin_bytes == 0 and in_pieces else 3 * GIB))

    monkeypatch.setattr(WholeRun, "replays", replays)
    close = budget_of(cap)
    for ask in (predictor_for(find_card("gtx-970"), close), functools.partial(predict, budget=close)):
        asked.clear()
        found = ask(profile_of(), 4, 1)
        assert asked == [free.margin_bytes, 0]
        assert (found.oom is not None and "the unknown at its most" in found.oom) == in_pieces
        assert not in_pieces or not found.fits(cap)


def test_the_margin_is_what_may_be_asked_for_where_fragments_hide_it() -> None:
    """A request that a cached block serves raises no peak here, and does where the fragments lie otherwise."""
    allocator = CachingAllocator(AllocatorSettings(), 4 * GIB)
    allocator.free(allocator.malloc(64 * MIB))
    stats = allocator.stats
    more = replace(
        stats,
        peak_requested_bytes=stats.peak_requested_bytes + 3 * MIB,
        peak_reserved_bytes=stats.peak_reserved_bytes - 2 * MIB,
        peak_allocated_bytes=stats.peak_allocated_bytes - MIB,
    )
    known, most = (predicting._most([Replay((end,), None, None)]) for end in (stats, more))
    assert max(m - k for m, k in zip(most, known, strict=True)) == 3 * MIB


def test_the_peak_is_the_larger_one_of_rising_and_falling_addresses() -> None:
    """Of two segments with equal room the lower one is taken; the other one alone can become whole again."""
    first, filler, second, either, whole = range(5)
    requests = [
        (6 * MIB, first), (14 * MIB, filler), (6 * MIB, second), (FREE_ID, filler),
        (14 * MIB, either), (FREE_ID, second), (20 * MIB, whole), (CHECKPOINT, 0),
    ]  # fmt: skip
    run = WholeRun(requests, [])
    reserved = [replay.checkpoints[-1].peak_reserved_bytes for replay in run.replays(AllocatorSettings())]
    assert reserved == [40 * MIB, 60 * MIB]
    assert predicting._most(run.replays(AllocatorSettings())).reserved_bytes == 60 * MIB
    assert len(run.replays(AllocatorSettings(expandable_segments=True))) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]
)
def test_every_zero_stage_is_predicted_with_its_bounds_in_the_margin(
    stage: int, offload: bool, accumulation: int
) -> None:
    profile = profile_of(engine="deepspeed", zero_stage=stage, offload_optimizer=offload, bucket_elements=10_000)
    found = predict(profile, 2, accumulation)
    assert found.oom is None and found.fits(4 * GIB)
    bounds = [entry.nbytes for entry in found.overlay if entry.is_bound and entry.is_replayed]
    assert max(bounds) <= found.margin_bytes <= 2 * sum(bounds)


def test_what_zero_leaves_cached_while_it_flattens_the_weights_is_replayed() -> None:
    """The flat weights, and beside them in the cache their originals and a second copy."""
    profile = profile_of(engine="deepspeed", zero_stage=2, offload_optimizer=True, bucket_elements=10_000)
    trace = trace_training(profile, 2)
    n, end = sum(trace.parameter_bytes), trace.marks["setup done"]
    flat = flattened_weights(trace)
    live = [live for i, live in flat.live_bytes(rounded=False) if i < flat.marks["setup done"]]
    before = [live for i, live in trace.live_bytes(rounded=False) if i < end][-1]
    assert (max(live), live[-1]) == (before + n, before)
    assert next(flat.requests(flat.marks["step 1"]))[0] == next(trace.requests(end))[0]
    assert predict(profile, 2).init_peak_bytes >= max(live)
