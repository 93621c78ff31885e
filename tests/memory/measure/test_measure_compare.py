"""What was measured against what was predicted: a real run on the CPU, and one on a card that is played."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_cuda import WORKSPACE_BYTES
from measured_runs import CAP_BYTES, nano, on_card, on_cpu

from nvae_lowmem.commands import measure_memory as measure_command
from nvae_lowmem.hardware.find_card import detect_card
from nvae_lowmem.memory.allocator.recording import RecordedCard, Recording
from nvae_lowmem.memory.measure.assess import assess
from nvae_lowmem.memory.measure.compare import compared, matched
from nvae_lowmem.memory.measure.job import Job, measure
from nvae_lowmem.memory.measure.report import as_table, as_text
from nvae_lowmem.units import MIB

# --- a real child on the CPU ------------------------------------------------------------------------------------------


def test_a_real_run_on_the_cpu_is_what_was_predicted() -> None:
    outcome = on_cpu()
    assert (outcome.status, outcome.detail, outcome.ended.code) == ("ok", "", 0)
    row = assess(outcome)
    assert row["agrees"] and row["stream"]["same_order"] and row["stream"]["unmatched"] == []
    assert row["stream"]["recorded"] == row["stream"]["expected"] > 1000
    for kind in ("allocated", "reserved", "host"):
        assert row["peaks"][kind]["error_percent"] == 0 and row["peaks"][kind]["measured"] > 0
    assert row["images_per_second"] == pytest.approx(4 / row["seconds_per_step"])
    assert (row["micro_batch"], row["accumulation"], row["engine"]) == (2, 2, "torch")
    measured = row["measured"]
    assert len(measured["seconds"]) == 3
    assert measured["versions"]["torch"] == str(torch.__version__) and measured["device"]["name"] == "cpu"
    json.dumps(row)
    text = as_text(row)
    assert "as predicted" in text and "one by one" in text
    assert "nano" in as_table([row, row]).splitlines()[2]


def test_a_run_that_takes_more_than_predicted_is_told() -> None:
    outcome = on_cpu()
    more = {kind: 10 * nbytes + 100 * MIB for kind, nbytes in outcome.result["peaks"].items()}
    row = assess(replace(outcome, result={**outcome.result, "peaks": more}))
    assert not row["agrees"] and row["peaks"]["allocated"]["error_percent"] < -90
    assert "MORE THAN THE MARGIN" in as_text(row) and "EXCEEDED" in as_text(row)
    assert measure_command._exit_status([row]) == 3


# --- a card played by the simulator -----------------------------------------------------------------------------------


def test_a_recorded_run_is_compared_in_all_three_ways() -> None:
    row = assess(on_card())
    assert row["replay"]["equal"] and row["replay"]["checkpoints"] == 4 and row["agrees"]
    assert row["cublas_kept_bytes"] == 2 * WORKSPACE_BYTES
    stream = row["stream"]
    assert not stream["same_order"] and stream["unknown_bytes"] == 0
    assert {(u["bytes"], u["what"]) for u in stream["unmatched"]} == {(3 * MIB + 1, "convolution workspace")}
    peaks = row["peaks"]
    assert peaks["within_margin"] and peaks["margin_bytes"] >= 64 * MIB
    assert peaks["allocated"]["measured"] - peaks["allocated"]["predicted"] in range(4 * MIB + 1)
    assert peaks["host"]["measured"] == 2 * MIB
    assert row["seconds_per_step"] == 0.375
    assert "replay" in as_text(row) and "equal" in as_table([row])


def test_what_neither_trace_nor_libraries_know_is_listed_first() -> None:
    row = assess(on_card(leak_bytes=200 * MIB))
    first = row["stream"]["unmatched"][0]
    assert (first["bytes"], first["recorded"], first["expected"], first["what"]) == (200 * MIB, 1, 0, "")
    assert row["stream"]["unknown_bytes"] == 200 * MIB and not row["agrees"]
    assert str(200 * MIB) in as_text(row)


def test_running_out_of_memory_agrees_only_where_it_was_predicted() -> None:
    outcome = replace(on_card(), status="out of memory", detail="in step 1: no room")
    assert not assess(outcome)["agrees"]
    assert outcome.decided is not None
    tight = outcome.decided.with_plan(cap_bytes=66 * MIB)
    row = assess(replace(outcome, decided=tight))
    assert row["agrees"] and "out of memory in step 1: no room, as predicted" in as_text(row)


def test_unmatched_sizes_know_which_side_has_more() -> None:
    def stream(sizes: Sequence[int]) -> Recording:
        return Recording("r", RecordedCard("", 1, 0, 0.0), [(n, i) for i, n in enumerate(sizes)], ((0, "forward"),), ())

    found = matched(stream([512, 512, 700, 900]), stream([512, 700, 800]), {900: "library"})
    assert [(u["bytes"], u["recorded"], u["expected"], u["what"]) for u in found["unmatched"]] == [
        (900, 1, 0, "library"),
        (800, 0, 1, ""),
        (512, 2, 1, ""),
    ]
    assert matched(stream([5, 6]), stream([5, 6]), {})["same_order"]


@pytest.mark.parametrize(("measured", "held"), [(110, True), (111, False)])
def test_the_margin_is_what_may_come_on_top(measured: int, held: bool) -> None:
    found = compared(
        {"allocated": 100, "reserved": 100, "host": 0}, {"allocated": measured, "reserved": 50, "host": 0}, 10
    )
    assert found["within_margin"] is held
    assert found["reserved"]["error_percent"] == pytest.approx(100.0)
    assert found["allocated"]["error_percent"] == pytest.approx(100 * (100 / measured - 1))
    assert found["host"]["error_percent"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_real_card_the_replay_is_equal(tmp_path: Path) -> None:
    outcome = measure(Job(name="nano", profile=nano(cap_bytes=CAP_BYTES), device="cuda"), tmp_path)
    row = assess(outcome, detect_card())
    assert row["replay"]["equal"], row["replay"]
    assert row["agrees"] and row["measured"]["workspaces"]
