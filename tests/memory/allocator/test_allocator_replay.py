"""The simulated CUDA caching allocator against recordings of the real one, and the command that replays them.

tests/fixtures/allocator: 40 random traces through PyTorch's own allocator (2.7.1 and 2.13.0 agree on all of them).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvae_lowmem.memory.allocator.__main__ import main
from nvae_lowmem.memory.allocator.recording import Recording, load_recordings

RECORDED = Path(__file__).parents[2] / "fixtures" / "allocator"
TRACES = load_recordings(RECORDED)


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_every_recorded_figure_is_reproduced(trace: Recording) -> None:
    assert trace.differences() == []


def test_the_recordings_cover_both_modes_retries_and_failures() -> None:
    assert {"expandable_segments:True" in trace.card.settings for trace in TRACES} == {False, True}
    assert any(trace.oom_index is not None for trace in TRACES)
    assert max(trace.checkpoints[-1].figures["retries"] for trace in TRACES) > 1


def test_command_reports_equality_in_its_last_line() -> None:
    command = [sys.executable, "-m", "nvae_lowmem.memory.allocator", str(RECORDED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RECORDED.parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "40 traces, 2447 checkpoints, mismatches: 0\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the recordings."""
    for path in RECORDED.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def _edit(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = folder / "expected.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def test_command_lists_each_mismatch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        entries[0]["checkpoints"][3][2] += 512
        entries[1]["checkpoints"].pop()

    recorded = TRACES[0].checkpoints[3].figures["peak_allocated_bytes"]
    _edit(folder, change)
    assert main([str(folder)]) == 1
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first == f"t5000, checkpoint 3: peak_allocated_bytes recorded {recorded + 512}, simulated {recorded}"
    assert second == "t5001, checkpoint 124: number of checkpoints recorded 124, simulated 125"
    assert summary == "40 traces, 2446 checkpoints, mismatches: 2"


def test_command_reports_a_failure_at_another_event(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit(folder, lambda entries: entries[4]["checkpoints"][-2].__setitem__(1, 244))
    assert main([str(folder)]) == 1
    assert "event that ran out of memory recorded 244, simulated 243" in capsys.readouterr().out


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)


def _set_events(folder: Path, events: Any) -> None:
    np.savez(folder / "traces.npz", **{trace.name: events for trace in TRACES})


BAD_INPUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no traces.npz": (lambda folder: (folder / "traces.npz").unlink(), "traces.npz"),
    "no expected.json": (lambda folder: (folder / "expected.json").unlink(), "expected.json"),
    "traces.npz cut short": (lambda folder: _truncate(folder / "traces.npz"), "traces.npz"),
    "traces.npz damaged": (lambda folder: _corrupt(folder / "traces.npz"), "traces.npz"),
    "expected.json cut short": (lambda folder: _truncate(folder / "expected.json"), "expected.json"),
    "empty expected.json": (lambda folder: _edit(folder, list.clear), "at least 1 item"),
    "not a list": (lambda folder: (folder / "expected.json").write_text("{}"), "valid array"),
    "not an object": (
        lambda folder: (folder / "expected.json").write_text("[3]"),
        "entry 0: Input should be an object",
    ),
    "key missing": (
        lambda folder: _edit(folder, lambda e: e[0].pop("total_bytes")),
        "entry 0, total_bytes: Field required",
    ),
    "bad checkpoint": (lambda folder: _edit(folder, lambda e: e[0]["checkpoints"].append(["OOM"])), "checkpoint"),
    "unknown trace": (lambda folder: _edit(folder, lambda e: e[0].update(trace="t0")), "no trace 't0'"),
    "bad settings": (lambda folder: _edit(folder, lambda e: e[0].update(settings="max:1")), "'max:1'"),
    "bad card": (lambda folder: _edit(folder, lambda e: e[0].update(memory_fraction=1.5)), "memory_fraction 1.5"),
    "wrong shape": (lambda folder: _set_events(folder, np.zeros((4, 3), int)), "(events, 2)"),
    "wrong type": (lambda folder: _set_events(folder, np.zeros((4, 2))), "(events, 2)"),
    "unknown op": (lambda folder: _set_events(folder, [[512, 0], [-2, 0]]), "event 1: op -2"),
    "unknown id": (lambda folder: _set_events(folder, [[512, 0], [-1, 1]]), "event 1: frees id 1"),
    "id in use": (lambda folder: _set_events(folder, [[512, 0], [512, 0]]), "event 1: allocates id 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_command_answers_bad_input_with_one_paragraph(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD_INPUT[case]
    spoil(folder)
    assert main([str(folder)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1
