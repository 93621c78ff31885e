"""Recordings of an allocator: from snapshots in PyTorch's form to files that replay to the byte."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CONTEXT_BYTES, WORKSPACE_BYTES, FakeCuda, watched
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.config.sections import MemoryPlan
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.__main__ import main as replay_recordings
from nvae_lowmem.memory.allocator.allocator import AllocatorStats, SimulatedOutOfMemory
from nvae_lowmem.memory.allocator.recording import (
    EXPECTED,
    OUT_OF_MEMORY,
    TRACES,
    Moment,
    RecordedCard,
    Recording,
    from_snapshot,
    load_recordings,
    save_recordings,
)
from nvae_lowmem.memory.allocator.segments import MemoryBlock
from nvae_lowmem.memory.measure.cuda import CudaMonitor
from nvae_lowmem.memory.measure.measurement import traced_recording
from nvae_lowmem.memory.trace.events import Allocation, Category, Phase, Trace
from nvae_lowmem.units import GIB, MIB


def exercise(cuda: FakeCuda, monitor: CudaMonitor, seed: int, rounds: int) -> None:
    """Random requests of many sizes, frees (some of them late), phases, checkpoints and emptied caches."""
    choose = random.Random(seed)
    live: list[MemoryBlock] = []
    late: list[MemoryBlock] = []
    for i in range(rounds):
        roll = choose.random()
        if roll < 0.5 or not live:
            live.append(cuda.malloc(choose.choice((1, 500, 3000, MIB, 5 * MIB, 30 * MIB)) + choose.randrange(2000)))
        elif roll < 0.8:
            cuda.free(live.pop(choose.randrange(len(live))))
        elif roll < 0.9:
            late.append(live.pop(choose.randrange(len(live))))
            cuda.ask_free(late[-1])
        elif roll < 0.95 and late:
            cuda.complete_free(late.pop())
        elif roll < 0.97:
            cuda.empty_cache()  # the monitor's, as DeepSpeed would call torch.cuda's
        else:
            monitor.phase(choose.choice(("forward", "backward")))
            monitor.checkpoint(f"at {i}")
    monitor.checkpoint("end")


def recorded(seed: int, rounds: int, text: str = "", name: str = "r") -> Recording:
    cuda = FakeCuda(text=text)
    monitor = watched(cuda)
    exercise(cuda, monitor, seed, rounds)
    made = monitor.recording(name, MemoryPlan(), text)
    monitor.close()
    assert made.checkpoints[-1].figures == asdict(cuda.allocator.stats)
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.sampled_from(["", "expandable_segments:True"]))
def test_any_recorded_stream_replays_to_the_byte(seed: int, rounds: int, text: str) -> None:
    made = recorded(seed, rounds, text)
    assert made.differences() == []
    assert made.oom_index is None and made.streams == 1 and made.card.context_bytes == CONTEXT_BYTES


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 100))
def test_files_hold_all_of_a_recording_and_replay_by_the_command(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rounds: int
) -> None:
    folder = tmp_path_factory.mktemp("recording")
    made = [recorded(seed, rounds, name="one"), recorded(seed + 1, rounds, "expandable_segments:True", name="two")]
    save_recordings(folder, made)
    again = load_recordings(folder)
    assert again == made
    assert [r.differences() for r in again] == [[], []]
    assert replay_recordings([str(folder)]) == 0


def test_a_run_that_runs_out_of_memory_ends_with_the_request_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(cap_bytes=64 * MIB)
    monitor = watched(cuda, monkeypatch)
    kept = [cuda.malloc(30 * MIB)]
    monitor.checkpoint("step 1")
    cached = cuda.malloc(30 * MIB)
    cuda.free(cached)
    with pytest.raises(SimulatedOutOfMemory):
        cuda.malloc(50 * MIB)
    cuda.free(kept.pop())  # unwinding: no longer part of it
    monitor.checkpoint("end")
    made = monitor.recording("full", MemoryPlan(cap_bytes=64 * MIB), "")
    assert made.oom_index == len(made.events) - 1 and made.events[-1][0] == 50 * MIB
    assert made.checkpoints[-1].name == OUT_OF_MEMORY
    assert [made.checkpoints[-1].figures[n] for n in ("ooms", "retries")] == [1, 1]
    assert made.differences() == []
    save_recordings(tmp_path, [made])
    assert load_recordings(tmp_path) == [made] and replay_recordings([str(tmp_path)]) == 0


def test_without_an_observer_of_failures_a_recording_ends_at_the_checkpoint_before() -> None:
    cuda = FakeCuda(cap_bytes=64 * MIB)
    monitor = watched(cuda)
    cuda.malloc(30 * MIB)
    monitor.checkpoint("step 1")
    with pytest.raises(SimulatedOutOfMemory):
        cuda.malloc(50 * MIB)
    monitor.checkpoint("end")
    cuda.malloc(1)
    made = monitor.recording("full", MemoryPlan(cap_bytes=64 * MIB), "")
    assert [name for name, _ in made.checkpoints] == ["step 1"] and made.oom_index is None
    assert [op for op, _ in made.events] == [WORKSPACE_BYTES, 30 * MIB] and made.differences() == []


def test_a_simulator_that_is_wrong_would_be_seen() -> None:
    made = recorded(3, 100)
    events = list(made.events)
    at = next(i for i, (op, _) in enumerate(events) if op > 0)
    events[at] = (events[at][0] + 4 * MIB, events[at][1])
    found = Recording(made.name, made.card, events, made.phases, made.checkpoints).differences()
    assert {d.figure for d in found} >= {"peak_allocated_bytes", "peak_requested_bytes"}
    assert all(d.recorded != d.simulated for d in found)


def test_requests_belong_to_the_phase_they_fall_in() -> None:
    cuda = FakeCuda()
    monitor = watched(cuda)
    for phase, sizes in (("setup", (100, 200)), ("forward", (300, 300)), ("backward", (300,))):
        monitor.phase(phase)
        blocks = [cuda.malloc(n) for n in sizes]
    cuda.free(blocks[0])
    monitor.checkpoint("end")
    made = monitor.recording("r", MemoryPlan(), "")
    counted = {("libraries", WORKSPACE_BYTES): 1, ("setup", 100): 1, ("setup", 200): 1}
    assert made.sizes() == {**counted, ("forward", 300): 2, ("backward", 300): 1}
    assert made.kept() == {**counted, ("forward", 300): 2}


def test_the_monitor_tells_peaks_and_what_lies_outside() -> None:
    cuda = FakeCuda()
    monitor = watched(cuda)
    cuda.free(cuda.malloc(30 * MIB))
    monitor.note_free("step 3")
    told = monitor.statistics()
    assert told.peak_allocated_bytes == 30 * MIB + WORKSPACE_BYTES
    assert told.peak_reserved_bytes == 32 * MIB and told.ooms == 0
    assert told.cublas_workspace_bytes == WORKSPACE_BYTES
    assert told.outside_allocator_bytes == CONTEXT_BYTES and told.used_before_context_bytes is None
    assert list(told.free_bytes) == ["context", "first convolution", "first matrix product", "step 3", "end"]


def test_what_a_call_takes_beside_its_result() -> None:
    cuda = FakeCuda()
    monitor = watched(cuda)

    def convolve() -> MemoryBlock:
        workspace = cuda.malloc(5 * MIB)
        out = cuda.malloc(1000)
        cuda.free(workspace)
        return out

    assert monitor.extra_bytes(convolve) == 5 * MIB

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    assert monitor.extra_bytes(fail) is None


def test_recording_ends_when_the_monitor_is_closed() -> None:
    cuda = FakeCuda()
    own = cuda.empty_cache
    said: list[Any] = []
    cuda.memory._record_memory_history = lambda **how: said.append(how["enabled"])
    monitor = watched(cuda)
    assert cuda.empty_cache != own
    monitor.close()
    assert cuda.empty_cache == own and said == ["all", None]


CARD = RecordedCard("", GIB, 0, 0.0)
ZERO = AllocatorStats(0, 0, 0, 0, 0, 0, 0, 0)
ALLOC, FREE = ({"action": a, "addr": 16, "size": 100} for a in ("alloc", "free_completed"))


@pytest.mark.parametrize(
    ("entries", "counted", "message"),
    [
        ([FREE], 1, "never allocated: recording has to begin before"),
        ([ALLOC, ALLOC], 2, "allocated twice"),
        ([ALLOC], 7, "7 allocations and frees were counted, but the history has only 1"),
        ([{**ALLOC, "size": -1}], 1, "-1 bytes makes no sense"),
        ([{"action": "alloc", "addr": 16}], 1, "None bytes makes no sense"),
    ],
)
def test_a_history_with_gaps_is_refused(entries: list[dict[str, Any]], counted: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_snapshot("r", entries, [Moment(counted, "checkpoint", "end", ZERO)], CARD)


def test_a_second_stream_is_counted() -> None:
    entries = [{"action": "alloc", "addr": n, "size": 512, "stream": n % 2} for n in (1, 2, 3)]
    assert from_snapshot("r", entries, [Moment(3, "checkpoint", "end", ZERO)], CARD).streams == 2


def test_a_traces_requests_are_those_on_the_card() -> None:
    rows = [(Phase.SETUP, Category.WEIGHT, 100), (Phase.FORWARD, Category.HOST, 50)]
    rows.append((Phase.FORWARD, Category.TEMPORARY, 200))
    trace = Trace([Allocation(n, c, "b", p, "op", i) for i, (p, c, n) in enumerate(rows)], [0, 1, 2, ~2, ~1])
    made = traced_recording("r", trace)
    assert [op for op, _ in made.events] == [100, 200, -1]
    assert list(made.requests()) == [("setup", 100), ("forward", 200)]


# --- files that are none ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_recordings(tmp_path, [recorded(1, 60)])
    return tmp_path


@pytest.mark.parametrize("file", [TRACES, EXPECTED])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.98])
def test_a_file_that_was_cut_short_is_one_message(folder: Path, file: str, share: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match=file):
        load_recordings(folder)
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=file):
        load_recordings(folder)


def test_a_foreign_archive_is_refused(folder: Path) -> None:
    np.savez(folder / TRACES, weights=np.zeros(3))
    with pytest.raises(ConfigError, match="no trace 'r'"):
        load_recordings(folder)
    (folder / TRACES).write_bytes(b"PK\x03\x04 but not a zip")
    with pytest.raises(ConfigError, match=r"cannot be read as an \.npz archive"):
        load_recordings(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("more", []), ("more", [["a", 1, 2]]), ("phases", [[1]]), ("streams", "1"), ("phases", 3), ("checkpoints", [[]])],
)
def test_a_recording_with_a_damaged_table_is_refused(folder: Path, key: str, value: Any) -> None:
    entries = json.loads((folder / EXPECTED).read_text())
    entries[0][key] = value
    (folder / EXPECTED).write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=rf"expected.json, entry 0.*{key}"):
        load_recordings(folder)
