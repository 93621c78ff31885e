"""The committed table of chosen plans: what it says is what is chosen and predicted today."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "hours-plans-2026-11-25.json").read_text(encoding="utf-8"))["plans"]
QUICK = 4


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("hours_plans")


def test_the_table_has_every_combination_and_two_that_were_held_out(benchmark: ModuleType) -> None:
    keys = ("card", "hours", "size", "images", "held_out")
    assert [tuple(row[key] for key in keys) for row in ROWS] == [
        tuple(getattr(case, key) for key in keys) for case in benchmark.CASES
    ]
    assert sum(row["held_out"] for row in ROWS) == 2
    assert {row["hours"] for row in ROWS} == {4, 24, 72} and {row["size"] for row in ROWS} == {32, 64, 128, 256}
    assert {row["images"] for row in ROWS} == {500, 5_000, 200_000}


def test_the_documented_table_is_the_committed_one(benchmark: ModuleType) -> None:
    assert benchmark.markdown(ROWS) in (BENCHMARKS.parent / "docs" / "hours.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_every_plan_fits_and_names_what_was_given_up(number: int) -> None:
    row = ROWS[number]
    assert row["fits"] and row["reserved_bytes"] <= row["cap_bytes"] and row["given_up"][0]
    assert row["passes"] <= 401 and row["ends_before_the_hours"] == (row["passes"] > 399)


@pytest.mark.parametrize(
    "number", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(len(ROWS))]
)
def test_the_committed_plans_are_chosen_today(benchmark: ModuleType, number: int) -> None:
    now, then = benchmark.row(benchmark.CASES[number]), ROWS[number]
    for key in ("rung", "channels", "groups", "parameters", "total_batch", "fits", "ends_before_the_hours"):
        assert now[key] == then[key], key
    # seconds follow from the plan that the planner's table finds best, which may get a little better or worse
    assert now["steps"] == pytest.approx(then["steps"], rel=0.05)
    assert now["given_up"][0].split()[:2] == then["given_up"][0].split()[:2]
    assert now["reserved_bytes"] <= now["cap_bytes"]
