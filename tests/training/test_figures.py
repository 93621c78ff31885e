"""stats.jsonl read while it is written: half a line, bad lines, a replaced file; and who trains in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.training.figures import Figures
from nvae_lowmem.training.monitor import Monitor
from nvae_lowmem.training.runs import locked, trained_by


def record(step: int, seconds: float, **values: Any) -> bytes:
    return json.dumps({"step": step, "time_seconds": seconds, **values}).encode() + b"\n"


def test_figures_are_those_that_a_monitor_wrote(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "stats.jsonl", ("train/loss",))
    assert figures.refresh().latest == {} and figures.seconds_per_step() is None
    with Monitor(tmp_path, total_steps=10) as monitor:
        monitor.scalars(1, {"train/loss": 5.0, "train/lr": 0.1})
        monitor.scalars(2, {"train/loss": float("nan"), "train/lr": 0.2})
        monitor.event(2, "alarm", "step 2: the loss is no number")
        monitor.scalars(4, {"train/loss": 3.0})
        monitor.event(5, "rewind", "back to step 2")
    figures.refresh()
    assert figures.series == {"train/loss": [(1, 5.0), (4, 3.0)]} and figures.step == 4
    assert figures.latest["train/lr"] == 0.2 and figures.events == [
        (2, "alarm", "step 2: the loss is no number"),
        (5, "rewind", "back to step 2"),
    ]
    with Monitor(tmp_path, total_steps=10, first_step=2) as monitor:  # goes on from step 2: step 4 is forgotten
        monitor.scalars(3, {"train/loss": 4.0})
    assert figures.refresh().series == {"train/loss": [(1, 5.0), (3, 4.0)]} and figures.step == 3


@given(st.lists(st.integers(0, 400), max_size=12))
def test_reading_in_pieces_is_reading_at_once(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    text = b"".join(record(step, step, loss=step / 3, name="x") for step in range(1, 9))
    path = tmp_path_factory.mktemp("figures") / "stats.jsonl"
    path.touch()
    growing = Figures(path, ("loss",))
    for cut in [*sorted(cuts), len(text)]:
        with path.open("ab") as file:
            file.write(text[path.stat().st_size : cut])
        growing.refresh()
        whole = text[:cut].count(b"\n")
        assert [step for step, _ in growing.series["loss"]] == list(range(1, whole + 1))
    assert growing.latest == Figures(path).refresh().latest


@pytest.mark.parametrize(
    "line",
    [b"{half", b"\xff\xfe", b"[1]", b"3", b'{"step": "4"}', b'{"loss": 1}', b"[" * 99999, b'{"step": true}', b""],
)
def test_lines_that_are_no_records_are_passed_over(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_bytes(record(1, 1, loss=2) + line + b"\n" + record(2, 2, loss=1))
    assert Figures(path, ("loss",)).refresh().series["loss"] == [(1, 2), (2, 1)]


def test_the_time_of_a_step_is_that_of_the_process_that_trains_now(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_bytes(record(1, 100) + record(11, 200) + record(12, 1) + record(14, 5))
    figures = Figures(path).refresh()
    assert figures.seconds_per_step() == 2
    with path.open("ab") as file:
        file.write(b"".join(record(14 + i, 5 + i) for i in range(1, 30)))
    assert figures.refresh().seconds_per_step() == 1  # the newest ones


def test_one_record_has_the_time_of_its_own_step(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").write_bytes(record(1, 9, **{"timing/sec_per_step": 4}))
    assert Figures(tmp_path / "stats.jsonl").refresh().seconds_per_step() == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no run")
def test_who_trains_is_told_without_locking(tmp_path: Path) -> None:
    assert trained_by(tmp_path) == ""
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in trained_by(tmp_path)
        before = (tmp_path / ".lock").stat()
        trained_by(tmp_path)
        assert (tmp_path / ".lock").stat() == before
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock = (tmp_path / ".lock").read_text()
    for text in (lock.replace(str(os.getpid()), str(ended.pid), 1), "process x", "", lock.replace(" on ", " on not-")):
        (tmp_path / ".lock").write_text(text)
        assert trained_by(tmp_path) == "", text
