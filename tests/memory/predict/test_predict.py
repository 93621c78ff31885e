"""Predictions: the replayed steps, what no trace sees, caps, and the command."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import MemoryPlan, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import usable_bytes
from nvae_lowmem.hardware.find_card import find_card
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, CachingAllocator
from nvae_lowmem.memory.predict import predict as predicting
from nvae_lowmem.memory.predict.predict import as_text, predict
from nvae_lowmem.memory.predict.untraced import (
    Entry,
    MeasuredEntry,
    Place,
    Span,
    cublas_workspace_bytes,
    entries,
    load_calibration,
    overlaid,
    pinned_bytes,
    without_weights,
)
from nvae_lowmem.memory.trace.events import Allocation, Category, Phase, Trace
from nvae_lowmem.memory.trace.inference import trace_generation
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import GIB, MIB
from profiles import NANO, budget_of, profile_of

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


# --- what no trace sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "nbytes"), [(":4096:2:16:8", 8_519_680), (":16:8", 128 << 10), (":4096:8", 32 << 20)]
)
def test_cublas_workspaces_are_pairs_of_size_and_count(config: str, nbytes: int) -> None:
    assert cublas_workspace_bytes(config) == nbytes


@pytest.mark.parametrize("config", ["4096:2", ":4096", ":a:b", ":"])
def test_a_cublas_configuration_that_is_none_is_refused(config: str) -> None:
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG"):
        cublas_workspace_bytes(config)


@given(st.integers(1, 1 << 40))
def test_pinned_memory_comes_in_powers_of_two(nbytes: int) -> None:
    taken = pinned_bytes(nbytes)
    assert nbytes <= taken < 2 * nbytes and taken & (taken - 1) == 0


def zero_bytes_per_parameter(accumulation: int, spans: Sequence[Span], **plan: Any) -> float:
    """What the entries and the trace's own weights, masters, gradients and states come to, per parameter.

    A model of 10.6 million parameters, its largest an eighth of it, buckets of two million.
    """
    n = 4 * 10_600_000
    trace = Trace(parameter_bytes=(n // 8, *[n // 32] * 28))
    whole = MemoryPlan(engine="deepspeed", bucket_elements=2_000_000, **plan)
    rows = entries(Profile(plan=whole), trace, accumulation)
    extra = sum(e.nbytes for e in rows if e.name.startswith("zero-") and e.span in spans and not e.is_bound)
    own = 12 if whole.offload_optimizer else 16  # weights, masters and gradients; or weights, states and gradients
    return own + 4 * extra / n


@pytest.mark.parametrize(
    ("accumulation", "spans", "plan", "measured"),
    [
        (1, (Span.ALWAYS,), {"zero_stage": 2, "offload_optimizer": True}, 25.0),
        (1, (Span.ALWAYS, Span.BACKWARD), {"zero_stage": 2, "offload_optimizer": True}, 25.78),
        (2, (Span.ALWAYS, Span.BACKWARD), {"zero_stage": 2, "offload_optimizer": True}, 29.8),
        (1, (Span.ALWAYS, Span.BACKWARD), {"zero_stage": 1, "offload_optimizer": True}, 29.26),
        (1, (Span.ALWAYS, Span.BACKWARD), {"zero_stage": 2}, 20.8),
    ],
)
def test_zero_takes_what_was_measured_of_it(
    accumulation: int, spans: tuple[Span, ...], plan: dict[str, Any], measured: float
) -> None:
    """Bytes per parameter over card and host, counted over all storages of DeepSpeed 0.19.8 in training on a CPU."""
    assert zero_bytes_per_parameter(accumulation, spans, **plan) == pytest.approx(measured, rel=0.02)


def test_zero_3_keeps_only_small_weights_on_the_card() -> None:
    sizes = (400, 8000, 8000, 20)
    allocations = [
        Allocation(n, Category.WEIGHT, "", Phase.SETUP, "aten::empty", i) for i, n in enumerate((*sizes, 8000))
    ]
    trace = Trace(allocations, list(range(5)), {"step 1": 5}, parameter_bytes=sizes)
    left = without_weights(trace, smallest_bytes=1000)
    assert [a.nbytes for a in left.allocations] == [400, 20, 8000]  # the last is a buffer of a weight's size
    assert left.marks == {"step 1": 3}


def test_the_host_holds_what_the_plan_sends_there() -> None:
    n = sum(trace_training(profile_of(), 2, steps=1).parameter_bytes)
    here = predict(profile_of(), 2)
    there, pinned = (predict(profile_of(**OFFLOADED, pin_memory=pin), 2) for pin in (False, True))
    assert 4 * n <= there.host_bytes - here.host_bytes < 4 * n + 2048  # and the numbers of the loss scale
    assert there.pinned_bytes == 0 and pinned.pinned_bytes >= 2 * n
    assert pinned.host_bytes == there.host_bytes - 2 * n + pinned.pinned_bytes
    parked = predict(profile_of(**{**OFFLOADED, "keep": "host"}), 32)
    assert 0 < parked.pinned_bytes < parked.host_bytes


def test_entries_are_held_in_their_phases() -> None:
    """A trace of one storage per phase; convolution entries come and go around the convolution alone."""
    phases = [
        (Phase.SETUP, "aten::empty"),
        (Phase.FORWARD, "aten::convolution"),
        (Phase.BACKWARD, "aten::mm"),
        (Phase.UPDATE, "aten::mul"),
    ]
    trace = Trace(
        [Allocation(512, Category.TEMPORARY, "b", phase, operation, i) for i, (phase, operation) in enumerate(phases)],
        list(range(4)), {"step 1": 1, "end": 4},
    )  # fmt: skip
    sizes = {Span.ALWAYS: 1024, Span.CONVOLUTION: 2048, Span.BACKWARD: 4096, Span.UPDATE: 8192}
    held = [Entry(name=str(span), nbytes=nbytes, span=span, source="test") for span, nbytes in sizes.items()]
    curve = [live for _, live in overlaid(trace, held).live_bytes()]
    base = 1024 + 512
    assert curve == [
        1024, base, base + 512, base + 512 + 2048, base + 512, base + 512 + 4096, base + 1024 + 4096, base + 1024,
        base + 1024 + 8192, base + 1536 + 8192, base + 1536,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["card.toml", "card.json"])
def test_a_calibration_replaces_a_bound_by_a_measurement(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    row = {"nbytes": 3 * MIB, "source": "measured here"}
    path.write_text(
        json.dumps({"cudnn-workspace": row})
        if path.suffix == ".json"
        else "[cudnn-workspace]\nnbytes = 3145728\nsource = 'measured here'"
    )
    found = predict(profile_of(), 2, calibration=load_calibration(path))
    entry = next(e for e in found.overlay if e.name == "cudnn-workspace")
    assert (entry.nbytes, entry.source, entry.is_bound) == (3 * MIB, "measured here", False)
    assert (entry.place, entry.span) == (Place.ALLOCATOR, Span.CONVOLUTION)
    assert found.margin_bytes < 64 * MIB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cudnn-workspaces]\nnbytes = 1", "did you mean 'cudnn-workspace'"),
        ("[cudnn-workspace]\nnbytes = -1", "whole number"),
        ("cudnn-workspace = 3", "must be a table"),
        ("[[[", "not valid TOML"),
        ("[cudnn-workspace]\nnbytes = " + "9" * 4000, "whole number from 0 to"),
    ],
)
def test_a_calibration_file_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "card.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_calibration(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_calibration(tmp_path / "absent.toml")


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    path = Path(__file__).parents[3] / "tools" / "predict_memory.py"
    spec = importlib.util.spec_from_file_location("predict_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code: int = module.main(arguments)
    return code


@pytest.fixture
def nano(tmp_path: Path) -> str:
    path = tmp_path / "nano.toml"
    plan = replace(profile_of(**OFFLOADED).plan, micro_batch=2)
    base = Profile(name="nano", model=NANO, plan=plan)
    profiles.save(replace(base, training=replace(base.training, total_batch=4)), path)
    return str(path)


def test_the_command_prints_a_table_and_says_whether_it_fits(nano: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--profile", nano, "--card", "gtx-970", "--os", "linux") == 0
    out, err = capsys.readouterr()
    assert "fits 3.20 GiB" in out and "2 x accumulation 2, fp16" in out
    assert "tracing" in err and " s\n" in err


def test_the_command_writes_json(nano: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert run("--profile", nano, "--micro-batch", "4", "--json", str(file)) == 0
    capsys.readouterr()
    assert run("--profile", nano, "--micro-batch", "4", "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert (printed["micro_batch"], printed["accumulation"]) == (4, 1)


def test_the_command_exits_with_3_where_it_does_not_fit(nano: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--profile", nano, "--set", "plan.cap_bytes=1048576") == 3
    assert "NO: more than the cap" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "mnits"), "did you mean 'mnist'"),
        (("--recipe", "tiny", "--micro-batch", "7"), "7"),
        (("--recipe", "tiny", "--micro-batch", "-1"), "--micro-batch -1"),
        (("--recipe", "tiny", "--card", "gtx-971"), "gtx-970"),
        (("--recipe", "tiny", "--gpu-mem", "4 apples"), "--gpu-mem"),
        (("--recipe", "tiny", "--set", "plan.keeep=all"), "plan.keep"),
        (("--recipe", "tiny", "--calibration", "absent.toml"), "cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("predict_memory.py: ")


def test_a_budget_decides_the_cap_that_the_steps_run_under() -> None:
    card = find_card("gtx-970")
    budget = usable_bytes(card, "linux")
    found = predict(profile_of(**OFFLOADED), 2, card=card, budget=budget)
    assert found.context_bytes == budget.context_bytes
    assert found.fits(budget.cap_bytes) and found.oom is None
