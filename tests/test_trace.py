"""The tracer: tensors without memory against real ones event by event, repetition, and batch sizes from two traces."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.recipes import recipe
from nvae_lowmem.config.sections import Profile, TrainConfig
from nvae_lowmem.memory.allocator.allocator import FREE_ID
from nvae_lowmem.memory.allocator.settings import MIN_BLOCK_BYTES
from nvae_lowmem.memory.trace import training as tracing
from nvae_lowmem.memory.trace.batch_scaling import NotAffine, affine
from nvae_lowmem.memory.trace.events import NotRepeatable, Trace, Window, loop_carried, repeat
from nvae_lowmem.memory.trace.storageless import StoragelessTensors, make_storageless, operator_info
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.training.engines.torch_engine import TorchEngine

aten = torch.ops.aten
SMALL_RGB = ModelConfig(
    image_channels=3, image_size=16, mixtures=2, channels_encoder=8, channels_decoder=8, scales=2, groups=2,
    adaptive=False, latents=3, cells_encoder=1, cells_decoder=1, preprocess_blocks=1, preprocess_cells=1,
    postprocess_blocks=1, postprocess_cells=1, flows=1,
)  # fmt: skip
NANO = replace(SMALL_RGB, image_size=8, channels_encoder=4, channels_decoder=4, scales=1, latents=2, flows=0)
MIXED = {"enc_*": "host", "dec_1*": "all", "head": "cheap"}


def profile_of(model: ModelConfig = NANO, clip_norm: float = 0.0, **plan: Any) -> Profile:
    plan = {"engine": "torch", "precision": "fp32", **plan}
    base = Profile(model=model, training=TrainConfig(clip_norm=clip_norm))
    return base.with_plan(**plan)


def lives(trace: Trace) -> list[tuple[Any, ...]]:
    return [(a.nbytes, *a.kind, a.born, a.died) for a in trace.allocations]


@cache
def small(micro_batch: int, accumulation: int = 1, steps: int = 1, **plan: Any) -> Trace:
    return trace_training(profile_of(**plan), micro_batch, accumulation, steps)


@pytest.mark.parametrize(
    ("model", "accumulation", "plan"),
    [
        (SMALL_RGB, 1, {"keep": "all"}),
        (NANO, 3, {"keep": "all", "precision": "fp16"}),
        (NANO, 1, {"keep": "cheap", "precision": "bf16"}),
        (NANO, 1, {"keep": "input", "offload_optimizer": True, "precision": "fp16"}),
        (NANO, 3, {"keep": "host"}),
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
def test_a_step_frees_all_that_it_allocates(offload: bool) -> None:
    trace = trace_training(profile_of(clip_norm=1.0, offload_optimizer=offload), 2, steps=2)
    assert loop_carried(trace, trace.marks["step 2"], trace.marks["end"]) == []


@pytest.mark.parametrize("offload", [False, True])
def test_further_micro_batches_need_what_the_second_does(offload: bool) -> None:
    first, second, *more = (small(2, n, offload_optimizer=offload).peak().nbytes for n in (1, 2, 3, 4))
    assert first <= second
    assert more[0] == more[1] == second


def test_one_power_iteration_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_iterations(self: Any, *args: Any) -> Any:
        self.tracer.phase = "forward"
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
    assert on_card.host_bytes() == 0
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
    assert all(a.died < 0 for a in trace.allocations[:end])


def of_events(events: list[int], **more: Any) -> Trace:
    """A trace of 64-byte temporaries; an event is an allocation's number, in order, or ~number for its free."""
    trace = Trace(**more)
    for event in events:
        if event >= 0:
            trace.allocate(64, "temporary", "", "forward", "op")
        else:
            trace.free(~event)
    return trace


def test_events_are_read_as_allocations_and_as_requests() -> None:
    trace = of_events([0, 1, ~0, 2, ~2, ~1])
    first, second, third = trace.allocations
    assert [*trace.walk()] == [
        (first, True), (second, True), (first, False), (third, True), (third, False), (second, False)
    ]  # fmt: skip
    assert [*trace.walk(2, 4)] == [(first, False), (third, True)]
    assert [*trace.requests(1)] == [(64, 1), (FREE_ID, 0), (64, 2), (FREE_ID, 2), (FREE_ID, 1)]
    second.category = "host"
    assert [*trace.requests()] == [(64, 0), (FREE_ID, 0), (64, 2), (FREE_ID, 2)]
    assert trace.host_bytes() == 64 and trace.peak(rounded=False).nbytes == 64 and trace.peak().nbytes == 512


# --- repetition -------------------------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> tuple[Trace, Window]:
    """Random allocations and frees, with a window that frees all it allocates and nothing else."""
    trace = Trace()
    live: list[int] = []

    def change(own: list[int]) -> None:
        if draw(st.booleans()) and own:
            number = own.pop(draw(st.integers(0, len(own) - 1)))
            trace.free(number)
        else:
            own.append(trace.allocate(draw(st.integers(1, 4096)), "temporary", "b", "forward", "op"))

    for _ in range(draw(st.integers(0, 8))):
        change(live)
    start = len(trace.events)
    inside: list[int] = []
    for _ in range(draw(st.integers(1, 8))):
        change(inside)
    for number in inside:
        trace.free(number)
    window = Window(start, len(trace.events), draw(st.integers(0, 3)))
    for _ in range(draw(st.integers(0, 8))):
        change(live)
    return trace, window


@given(traces())
def test_repeating_what_frees_all_its_own_repeats_the_curve(case: tuple[Trace, Window]) -> None:
    trace, (start, end, times) = case
    longer, origins = repeat(trace, [Window(start, end, times)])
    curve = [live for _, live in trace.live_bytes()]
    assert [live for _, live in longer.live_bytes()] == curve[:start] + (times + 1) * curve[start:end] + curve[end:]
    assert [a.nbytes for a in longer.allocations] == [trace.allocations[n].nbytes for n in origins]
    assert [a.born if is_alloc else a.died for a, is_alloc in longer.walk()] == [*range(len(longer.events))]


def test_what_one_round_hands_to_the_next_is_freed_by_the_next() -> None:
    trace = of_events([0, 1, ~0, 2, ~1, ~2])  # each is allocated before its predecessor is freed
    longer, _ = repeat(trace, [Window(1, 3, 2)])
    assert longer.events == [0, 1, ~0, 2, ~1, 3, ~2, 4, ~3, ~4]


def test_a_window_that_leaves_more_than_it_found_cannot_happen_twice() -> None:
    with pytest.raises(NotRepeatable, match="leave"):
        repeat(of_events([0]), [Window(0, 1, 1)])


# --- affine in the batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk_bytes", "batches"), [(64 << 20, (2, 3, 9)), (4_000, (3, 2, 5))])
def test_two_traces_give_the_trace_of_another_batch(chunk_bytes: int, batches: tuple[int, int, int]) -> None:
    plan = {"keep": "input", "precision": "fp16", "likelihood_chunk_bytes": chunk_bytes, "offload_optimizer": True}
    first, second, wanted = (small(b, **plan) for b in batches)
    made = affine(first, second)(batches[2])
    assert lives(made) == lives(wanted)
    assert (made.events, made.marks, made.micro_batch) == (wanted.events, wanted.marks, wanted.micro_batch)


def test_whole_chunks_of_several_images_are_extended() -> None:
    plan = {"likelihood_chunk_bytes": 60_000}
    chunk = small(2, **plan).chunk_images
    assert 1 < chunk < 8
    assert [len(starts) for starts in small(chunk, **plan).chunks] == [1, 1]
    assert [len(starts) for starts in small(chunk + 1, **plan).chunks] == [2, 2]
    made = affine(small(2 * chunk, **plan), small(3 * chunk, **plan))
    assert lives(made(5 * chunk)) == lives(small(5 * chunk, **plan))
    for other in (chunk, 3 * chunk + 1):
        with pytest.raises(NotAffine, match=f"{chunk} images at a time"):
            made(other)


def test_chunks_that_leave_more_than_they_find_are_not_affine() -> None:
    """As a plain ValueError this would end a prediction, which traces the batch itself where NotAffine says so."""
    one_leaves_64_bytes = of_events([0, 1], micro_batch=2, chunk_images=1, chunks=[[0, 1]])
    with pytest.raises(NotAffine, match="cannot be repeated: events 0 to 1 free .* and leave"):
        affine(one_leaves_64_bytes, of_events([0, 1, 2], micro_batch=3, chunk_images=1, chunks=[[0, 1, 2]]))


def test_traces_that_do_not_belong_together_are_told_apart() -> None:
    with pytest.raises(NotAffine, match="micro-batch 2"):
        affine(small(2), small(2))
    with pytest.raises(NotAffine, match="events"):
        affine(small(2), small(3, keep="input"))
    with pytest.raises(NotAffine, match="bytes at micro-batch 2"):
        affine(small(2), replace(small(4), allocations=[replace(a, nbytes=a.nbytes + 1) for a in small(4).allocations]))


# --- without memory ---------------------------------------------------------------------------------------------------


def test_a_tensor_without_memory_reports_its_bytes_and_has_none() -> None:
    tensor = make_storageless((1 << 20, 1 << 20), (1 << 20, 1), torch.float16)
    assert type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    assert tensor.untyped_storage().nbytes() == 2 << 40 and tensor.data_ptr() == 0
    assert tensor[0].untyped_storage()._cdata == tensor.untyped_storage()._cdata


@pytest.mark.parametrize(("scalar", "dtype"), [(1, torch.int64), (1.0, torch.float32), (True, torch.int64)])
def test_equal_arguments_of_other_types_have_other_answers(scalar: float, dtype: torch.dtype) -> None:
    tensors, integers = StoragelessTensors(), make_storageless((3,), (1,), torch.int64)
    func = aten.mul.Tensor
    for other in (1, 1.0, True):  # so that all three are remembered, whichever is asked for
        tensors.run(func, operator_info(func), (integers, other), {})
    assert tensors.run(func, operator_info(func), (integers, scalar), {}).dtype == dtype


def test_operations_that_write_return_what_they_were_given() -> None:
    tensors = StoragelessTensors()
    a, b = (make_storageless((2, 3), (3, 1), torch.float32) for _ in range(2))
    assert tensors.run(aten.add_.Tensor, operator_info(aten.add_.Tensor), (a, b), {}) is a
    assert tensors.run(aten.maximum.out, operator_info(aten.maximum.out), (a, b), {"out": b}) is b
    sums = tensors.run(aten.sum.dim_IntList, operator_info(aten.sum.dim_IntList), (a, [1]), {"keepdim": True})
    assert sums.shape == (2, 1) and sums.untyped_storage().nbytes() == 8


def test_half_precision_with_the_optimiser_on_the_card_still_has_its_states() -> None:
    states = {}
    for precision in ("fp16", "fp32"):
        profile = recipe("tiny")
        plan = replace(profile.plan, precision=precision, engine="torch")
        trace = trace_training(replace(profile, plan=plan), 2, steps=2)
        states[precision] = sum(a.nbytes for a in trace.allocations if a.category == "optimizer state" and a.died < 0)
    assert states["fp16"] == states["fp32"] > 0
