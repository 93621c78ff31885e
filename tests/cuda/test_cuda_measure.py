"""Measuring on a card: one profile, its recordings compared again, and the whole matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from card_runs import process, write_profile

from nvae_lowmem.commands.measure_memory import MATRIX
from nvae_lowmem.errors import ExitCode
from nvae_lowmem.memory.measure.measured_files import MEASUREMENTS

pytestmark = pytest.mark.cuda


def test_a_profile_is_measured_compared_and_compared_again(tmp_path: Path) -> None:
    out, report = tmp_path / "measured", tmp_path / "report.json"
    profile = write_profile(tmp_path, 'plan.precision = "fp16"')
    done = process("tools/measure_memory.py", "--profile", profile, "--out", out, "--json", report)
    assert done.code == 0, done.said + done.complained
    assert (out / MEASUREMENTS).is_file() and (out / "calibration.toml").is_file()
    (row,) = json.loads(report.read_text())["runs"]
    again = process("tools/measure_memory.py", "--compare", out, "--json", "-")
    assert again.code == 0, again.complained
    assert json.loads(again.said)["runs"] == [row]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_configuration_of_the_matrix_is_a_row(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = process("tools/measure_memory.py", "--matrix", "--json", report, timeout=3500)
    rows = json.loads(report.read_text())["runs"]
    assert done.code in (ExitCode.DONE, ExitCode.DOES_NOT_FIT), done.said + done.complained
    assert len(rows) == len(MATRIX) and {row["status"] for row in rows} == {"ok"}, done.said
