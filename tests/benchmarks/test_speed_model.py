"""The speed model beside published timings: the committed figures are today's, and people are shown what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from nvae_lowmem.config.recipes import PUBLISHED_RECIPES
from nvae_lowmem.memory.plan.duration import PUBLISHED_RATIO, estimated

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = json.loads((BENCHMARKS / "results" / "speed_model.json").read_text(encoding="utf-8"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed_model")


def test_what_people_are_shown_rests_on_the_committed_benchmark() -> None:
    assert round(RESULTS["geometric_mean"], 1) == PUBLISHED_RATIO
    assert list(RESULTS["recipes"]) == list(PUBLISHED_RECIPES)


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_one_factor_puts_every_published_timing_within_a_fifth(name: str) -> None:
    row = RESULTS["recipes"][name]
    least, most = estimated(1 / row["estimated_images_per_second"], 1).images_per_second
    assert 0.8 * least <= row["published_images_per_second"] <= most
    assert row["published_images_per_second"] == pytest.approx(least, rel=0.2)


def test_the_committed_figures_are_what_the_speed_model_says_today(benchmark: ModuleType) -> None:
    row, name = RESULTS["recipes"]["mnist"], "mnist"
    assert benchmark.estimate(name) == pytest.approx(row["estimated_images_per_second"], rel=1e-3)
    assert benchmark.published(name) == pytest.approx(row["published_images_per_second"], rel=1e-3)
