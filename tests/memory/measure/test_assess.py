"""What was measured against what was predicted: a real run on the CPU, and one on a card that is played."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import WORKSPACE_BYTES
from measured_runs import CAP_BYTES, nano, on_card, on_cpu

from nvae_lowmem.commands import measure_memory as measure_command
from nvae_lowmem.hardware.find_card import detect_card
from nvae_lowmem.memory.allocator.recording import RecordedCard, Recording
from nvae_lowmem.memory.measure import assess as assessing
from nvae_lowmem.memory.measure.assess import assess, assess_or_fail, compare_peaks, compare_streams
from nvae_lowmem.memory.measure.job import Job, measure
from nvae_lowmem.memory.measure.report import as_table, as_text
from nvae_lowmem.memory.predict.figures import MemoryFigures
from nvae_lowmem.units import MIB

# --- a real child on the CPU ------------------------------------------------------------------------------------------


def test_a_real_run_on_the_cpu_is_what_was_predicted() -> None:
    outcome = on_cpu()
    assert (outcome.status, outcome.detail, outcome.ended.code) == ("ok", "", 0)
    found = assess(outcome)
    stream, peaks, measured = found.stream, found.peaks, outcome.measured
    assert stream is not None and peaks is not None and measured is not None
    assert found.agrees and stream.same_order and stream.unmatched == ()
    assert stream.recorded == stream.expected > 1000
    for peak in (peaks.allocated, peaks.reserved, peaks.host):
        assert peak.error_percent == 0 and peak.measured > 0
    assert len(measured.seconds) == 3
    assert measured.versions["torch"] == str(torch.__version__) and measured.device.name == "cpu"
    text = as_text(found)
    assert "as predicted" in text and "one by one" in text
    assert "nano" in as_table([found, found]).splitlines()[2]


def test_a_row_of_the_report_tells_the_configuration_and_the_speed() -> None:
    row = assess(on_cpu()).to_json()
    assert json.loads(json.dumps(row)).keys() == row.keys()
    assert row["images_per_second"] == pytest.approx(4 / row["seconds_per_step"])
    assert (row["micro_batch"], row["accumulation"], row["engine"], row["agrees"]) == (2, 2, "torch", True)
    assert row["peaks"]["allocated"]["predicted"] == row["peaks"]["allocated"]["measured"]


def test_a_run_that_takes_more_than_predicted_is_told() -> None:
    outcome = on_cpu()
    assert outcome.measured is not None and outcome.measured.peaks is not None
    more = {kind: 10 * nbytes + 100 * MIB for kind, nbytes in asdict(outcome.measured.peaks).items()}
    found = assess(replace(outcome, measured=replace(outcome.measured, peaks=MemoryFigures(**more))))
    assert found.agrees is False and found.peaks is not None
    assert found.peaks.allocated.error_percent is not None and found.peaks.allocated.error_percent < -90
    assert "MORE THAN THE MARGIN" in as_text(found) and "EXCEEDED" in as_text(found)
    assert measure_command.exit_code_of([found]) == 3


# --- a card played by the simulator -----------------------------------------------------------------------------------


def test_a_recorded_run_is_compared_in_all_three_ways() -> None:
    found = assess(on_card())
    replay, stream, peaks = found.replay, found.stream, found.peaks
    assert replay is not None and stream is not None and peaks is not None
    assert replay.equal and replay.checkpoints == 4 and found.agrees
    assert found.cublas_kept_bytes == 2 * WORKSPACE_BYTES
    assert not stream.same_order and stream.unknown_bytes == 0
    assert {(u.bytes, u.what) for u in stream.unmatched} == {(3 * MIB + 1, "convolution workspace")}
    assert peaks.within_margin and peaks.margin_bytes >= 64 * MIB
    assert peaks.allocated.measured - peaks.allocated.predicted in range(4 * MIB + 1)
    assert peaks.host.measured == 2 * MIB
    assert found.to_json()["seconds_per_step"] == 0.375
    assert "replay" in as_text(found) and "equal" in as_table([found])


def test_what_neither_trace_nor_libraries_know_is_listed_first() -> None:
    found = assess(on_card(leak_bytes=200 * MIB))
    assert found.stream is not None
    first = found.stream.unmatched[0]
    assert (first.bytes, first.recorded, first.expected, first.what) == (200 * MIB, 1, 0, "")
    assert found.stream.unknown_bytes == 200 * MIB and found.agrees is False
    assert str(200 * MIB) in as_text(found)


def test_running_out_of_memory_agrees_only_where_it_was_predicted() -> None:
    outcome = replace(on_card(), status="out of memory", detail="in step 1: no room")
    assert assess(outcome).agrees is False
    assert outcome.resolved is not None
    tight = outcome.resolved.with_plan(cap_bytes=66 * MIB)
    found = assess(replace(outcome, resolved=tight))
    assert found.agrees and "out of memory in step 1: no room, as predicted" in as_text(found)


def test_whatever_ends_a_comparison_is_a_failed_run_that_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(assessing, "trace_training", broken)
    found = assess_or_fail(on_card())
    assert found.outcome.status == "failed" and found.agrees is None
    assert found.outcome.detail.startswith("cannot be compared: ZeroDivisionError: by nothing (broken, line ")
    assert found.to_json()["measured"]["seconds"] == (2.0, 0.5, 0.25)  # what was measured is not lost
    assert "failed" in as_table([found]) and measure_command.exit_code_of([found]) == 1


def test_unmatched_sizes_know_which_side_has_more() -> None:
    def stream(sizes: Sequence[int]) -> Recording:
        return Recording("r", RecordedCard("", 1, 0, 0.0), [(n, i) for i, n in enumerate(sizes)], ((0, "forward"),), ())

    found = compare_streams(stream([512, 512, 700, 900]), stream([512, 700, 800]), {900: "library"})
    assert [u[1:] for u in found.unmatched] == [
        (900, 1, 0, "library"),
        (800, 0, 1, ""),
        (512, 2, 1, ""),
    ]
    assert compare_streams(stream([5, 6]), stream([5, 6]), {}).same_order


@pytest.mark.parametrize(("measured", "held"), [(110, True), (111, False)])
def test_the_margin_is_what_may_come_on_top(measured: int, held: bool) -> None:
    found = compare_peaks(figures(100, 100), figures(measured, 50), margin_bytes=10)
    assert found.within_margin is held
    assert found.reserved.error_percent == pytest.approx(100.0)
    assert found.allocated.error_percent == pytest.approx(100 * (100 / measured - 1))
    assert found.host.error_percent is None


def figures(allocated: int, reserved: int) -> MemoryFigures:
    return MemoryFigures(allocated_peak_bytes=allocated, reserved_peak_bytes=reserved, host_bytes=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_real_card_the_replay_is_equal(tmp_path: Path) -> None:
    outcome = measure(Job(name="nano", profile=nano(cap_bytes=CAP_BYTES), device="cuda"), tmp_path)
    found = assess(outcome, detect_card())
    assert found.replay is not None and found.replay.equal, found.replay
    assert found.agrees and outcome.measured is not None and outcome.measured.workspaces
