"""What no trace sees: entries, their spans, calibration files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.config.sections import MemoryPlan, Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.predict.predict import predict
from nvae_lowmem.memory.predict.untraced import (
    Entry,
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
from nvae_lowmem.units import MIB
from profiles import profile_of


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
