"""Traced training: without memory against a real step event by event, and what plans keep where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from traced_steps import lives, small

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.recipes import recipe
from nvae_lowmem.config.sections import Keep, Profile
from nvae_lowmem.memory.allocator.settings import MIN_BLOCK_BYTES
from nvae_lowmem.memory.trace import training as tracing
from nvae_lowmem.memory.trace.events import Phase, Window, loop_carried, repeat
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from profiles import NANO, SMALL_RGB, profile_of

LABELLED = replace(NANO, classes=5)
MIXED = {"enc_*": "host", "dec_1*": "all", "head": "cheap"}


@pytest.mark.parametrize(
    ("model", "accumulation", "plan"),
    [
        (SMALL_RGB, 1, {"keep": "all"}),
        (NANO, 3, {"keep": "all", "precision": "fp16"}),
        (NANO, 1, {"keep": "cheap", "precision": "bf16"}),
        (NANO, 1, {"keep": "input", "offload_optimizer": True, "precision": "fp16"}),
        (NANO, 3, {"keep": "host"}),
        (LABELLED, 3, {"keep": "all", "precision": "fp16"}),
        (LABELLED, 1, {"keep": "host", "keep_blocks": {"dec_0_1": "cheap"}, "offload_optimizer": True}),
        (SMALL_RGB, 3, {"keep": "input", "keep_blocks": MIXED, "offload_optimizer": True}),
    ],
)
def test_a_trace_without_memory_equals_that_of_a_real_step(
    model: ModelConfig, accumulation: int, plan: dict[str, Any]
) -> None:
    profile = profile_of(model, **plan)
    traced, real = (trace_training(profile, 2, accumulation, steps=1, fake=fake) for fake in (True, False))
    assert lives(traced) == lives(real)
    assert traced.events == real.events
    assert traced.peak() == real.peak()


ENCODER = ("stem", "pre_*", "enc_*", "top")


def frozen(freeze: tuple[str, ...], model: ModelConfig = SMALL_RGB, **plan: Any) -> Profile:
    profile = profile_of(model, **plan)
    return replace(profile, training=replace(profile.training, freeze=freeze))


@pytest.mark.parametrize(
    ("freeze", "accumulation", "plan"),
    [
        (ENCODER, 1, {"keep": "all"}),
        (("dec_*", "start"), 3, {"keep": "cheap", "precision": "bf16"}),
        (("stem", "pre_*", "dec_1_0"), 1, {"keep": "input", "offload_optimizer": True, "precision": "fp16"}),
        ((*ENCODER, "post_*", "head"), 3, {"keep": "host", "keep_blocks": {"dec_1*": "all"}}),
        (("dec_0_*", "post_*"), 1, {"keep": "all"}),
    ],
)
def test_a_trace_with_frozen_blocks_equals_that_of_a_real_step(
    freeze: tuple[str, ...], accumulation: int, plan: dict[str, Any]
) -> None:
    profile = frozen(freeze, **plan)
    traced, real = (trace_training(profile, 2, accumulation, steps=2, fake=fake) for fake in (True, False))
    assert lives(traced) == lives(real)
    assert traced.events == real.events and traced.peak() == real.peak()


@pytest.mark.parametrize("keep", ["all", "cheap"])  # under input, a decoder block keeps the map that it is given
def test_frozen_blocks_that_nothing_learns_before_keep_no_activations(keep: Keep) -> None:
    def kept(freeze: tuple[str, ...]) -> dict[str, int]:
        """Bytes of activations by block at the end of the forward pass."""
        trace = trace_training(frozen(freeze, keep=keep), 2, steps=1)
        end = next(a.born for a in trace.allocations if a.phase == "backward")
        found: dict[str, int] = {}
        for a in trace.allocations:
            alive = a.born < end and (a.died < 0 or a.died >= end)
            if alive and a.phase == "forward" and a.category in ("saved activation", "temporary"):
                found[a.block] = found.get(a.block, 0) + a.nbytes
        return found

    everything, without = kept(()), kept(ENCODER)
    for name in ("stem", "pre_0_0", "enc_0_0", "enc_0_down", "enc_1_0"):
        assert without.get(name, 0) == 0
        assert everything[name] > 0
    assert without["dec_0_0"] <= everything["dec_0_0"]


def test_frozen_blocks_have_no_states_and_no_gradients() -> None:
    whole, part = (trace_training(frozen(freeze), 2, steps=2) for freeze in ((), ENCODER))
    assert sum(part.parameter_bytes) < sum(whole.parameter_bytes)
    for trace in (whole, part):
        states = sum(a.nbytes for a in trace.allocations if a.category == "optimizer state" and a.died < 0)
        assert 2 * sum(trace.parameter_bytes) <= states < 2.1 * sum(trace.parameter_bytes)
    on_host = frozen(ENCODER, offload_optimizer=True)
    assert trace_training(on_host, 2, steps=1).host_bytes() == 2 * sum(part.parameter_bytes)


def test_two_real_steps_of_a_shipped_recipe_are_traced_exactly() -> None:
    profile = replace(recipe("tiny"), plan=profile_of(keep="input").plan)
    traced, real = (trace_training(profile, 2, steps=2, fake=fake) for fake in (True, False))
    assert lives(traced) == lives(real) and traced.events == real.events
    states = sum(a.nbytes for a in traced.allocations if a.category == "optimizer state")
    assert 2 * sum(traced.parameter_bytes) <= states < 2.1 * sum(traced.parameter_bytes)


def test_steps_are_alike_where_the_host_keeps_the_states() -> None:
    one, two = (small(2, steps=steps, keep="input", offload_optimizer=True, precision="fp16") for steps in (1, 2))
    again, _ = repeat(one, [Window(one.marks["step 1"], one.marks["end"], 1)])
    assert lives(again) == lives(two) and again.events == two.events


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_frees_all_that_it_allocates_but_its_figures(offload: bool) -> None:
    trace = trace_training(profile_of(clip_norm=1.0, offload_optimizer=offload), 2, steps=2)
    left = [trace.allocations[n].nbytes for _, n in loop_carried(trace, trace.marks["step 2"], trace.marks["end"])]
    assert left == [4, 4, *[4 * NANO.total_groups] * 3]


@pytest.mark.parametrize("offload", [False, True])
def test_further_micro_batches_need_what_the_second_does(offload: bool) -> None:
    first, second, *more = (small(2, n, offload_optimizer=offload).peak().nbytes for n in (1, 2, 3, 4))
    assert first <= second
    assert more[0] == more[1] == second


def test_one_power_iteration_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_iterations(self: Any, *args: Any) -> Any:
        self.tracer.phase = Phase.FORWARD
        return TorchEngine.forward(self, *args)

    one = small(2)
    monkeypatch.setattr(tracing.TracedEngine, "forward", all_iterations)
    four = trace_training(profile_of(), 2, steps=1)
    assert len(four.events) > len(one.events)
    assert four.peak().nbytes == one.peak().nbytes and four.peak().by_category == one.peak().by_category


def test_policies_keep_less_and_less_on_the_card() -> None:
    peaks = {keep: small(8, keep=keep, offload_optimizer=True).peak() for keep in ("all", "cheap", "input", "host")}
    sizes = [peak.nbytes for peak in peaks.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[2]
    assert peaks["all"].by_category["saved activation"] > peaks["input"].by_category["saved activation"]


def test_what_a_plan_keeps_on_the_host_is_host_memory() -> None:
    on_card = small(2, keep="input")
    assert on_card.host_bytes() == 4 * len(on_card.parameter_bytes)  # the optimiser counts its steps there
    n = sum(on_card.parameter_bytes)
    masters = small(2, keep="input", offload_optimizer=True)
    assert masters.host_bytes() == 2 * n  # weights and gradients; the states are in nobody's trace
    parked = small(32, keep="host", offload_optimizer=True)
    assert parked.host_bytes() > masters.host_bytes()


def test_the_peak_is_the_sum_of_what_lives_then() -> None:
    trace = small(2)
    peak = trace.peak(rounded=False)
    assert sum(peak.by_category.values()) == sum(peak.by_block.values()) == peak.nbytes
    assert peak.by_category["weight"] >= sum(trace.parameter_bytes)
    assert peak.phase in ("forward", "backward") and peak.operation.startswith("aten::")
    assert trace.peak().nbytes % MIN_BLOCK_BYTES == 0


def test_the_set_up_leaves_only_what_stays() -> None:
    trace = small(2)
    end = trace.marks["setup done"]
    assert all(event >= 0 for event in trace.events[:end])
    assert all(a.died < 0 for a in trace.allocations[:end] if a.category != "data")  # a step's figures


def test_half_precision_with_the_optimiser_on_the_card_still_has_its_states() -> None:
    states = {}
    for precision in ("fp16", "fp32"):
        profile = recipe("tiny")
        plan = replace(profile.plan, precision=precision, engine="torch")
        trace = trace_training(replace(profile, plan=plan), 2, steps=2)
        states[precision] = sum(a.nbytes for a in trace.allocations if a.category == "optimizer state" and a.died < 0)
    assert states["fp16"] == states["fp32"] > 0
