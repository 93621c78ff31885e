"""What a run that goes on does with the story of the run that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvae_lowmem.training.monitor import Monitor


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("first_step", "kept"), [(3, [1, 2, 3]), (0, [])])
def test_figures_of_steps_that_are_made_anew_are_dropped(tmp_path: Path, first_step: int, kept: list[int]) -> None:
    with Monitor(tmp_path, total_steps=9) as monitor:
        for step in range(1, 6):
            monitor.scalars(step, {"train/loss": 0.5 * step})
    with (tmp_path / "stats.jsonl").open("a") as stats:
        stats.write('{"step": 6, "train/lo')  # killed while it wrote
    with Monitor(tmp_path, 9, first_step) as monitor:
        assert steps(tmp_path) == kept
        monitor.scalars(first_step + 1, {"train/loss": 7.0})
    assert steps(tmp_path) == [*kept, first_step + 1]
    assert sorted(p.name for p in tmp_path.iterdir() if "events" not in p.name) == ["stats.jsonl"]
