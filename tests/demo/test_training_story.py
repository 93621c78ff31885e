"""What the page tells of a run in training: from its files alone, whole or not, none of which is touched."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_runs import GREY, demo_run

from nvae_lowmem.config import profile_file
from nvae_lowmem.config.sections import MemoryPlan, Profile, TrainConfig
from nvae_lowmem.data.fingerprint import FILE_NAME
from nvae_lowmem.demo.state import DemoState
from nvae_lowmem.demo.story import RunStory
from nvae_lowmem.demo.training_tab import loss_chart
from nvae_lowmem.generation import grids
from nvae_lowmem.generation.recalibrate import statistics_path
from nvae_lowmem.training.open_run import open_run
from nvae_lowmem.training.runs import locked
from nvae_lowmem.units import GIB


def begun(folder: Path, **provenance: Any) -> Path:
    """A run that has been configured, of 40 steps of 8 images, without checkpoints."""
    training = TrainConfig(epochs=10, total_batch=8)
    plan = MemoryPlan(cap_bytes=4 * GIB, micro_batch=8)
    folder.mkdir(exist_ok=True)
    profile = Profile(name="t", model=GREY, training=training, plan=plan, provenance=provenance)
    profile_file.save(profile, folder / "config.toml")
    (folder / FILE_NAME).write_text(json.dumps({"train_images": 32}))
    return folder


def add(folder: Path, step: int, seconds: float, **values: float) -> None:
    groups = {f"kl_vals/layer_{i}": float(i) for i in range(3)} | {f"kl/active_{i}": 0.5 for i in range(3)}
    record = {"step": step, "time_seconds": seconds, "train/nelbo_iter": 100 / step, "train/loss": 90 / step}
    with (folder / "stats.jsonl").open("a") as file:
        file.write(json.dumps(record | groups | values) + "\n")


def draw(folder: Path, *names: str) -> None:
    for value, name in enumerate(names):
        grids.save_png(np.full((4, 6, 3), value, np.uint8), folder / "samples" / name)


def test_time_left_is_that_of_the_steps_to_come(tmp_path: Path) -> None:
    story = RunStory(begun(tmp_path))
    assert story.total_steps == 40 and story.seconds_left() is None
    add(tmp_path, 2, 10)
    add(tmp_path, 10, 26)
    story.refresh()
    assert story.seconds_left() == 30 * 2
    rows = dict(story.rows())
    assert rows["step"] == "10 of 40 (25%)" and rows["time left"].startswith("about 1 min 00 s")
    add(tmp_path, 40, 86)
    story.refresh()
    assert dict(story.rows())["state"] == "finished" and "time left" not in dict(story.rows())


def test_a_training_that_ends_at_an_hour_has_as_many_steps_as_were_planned_last(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    profile = profile_file.load(folder / "config.toml")
    profile_file.save(replace(profile, training=replace(profile.training, hours=2.0)), folder / "config.toml")
    story = RunStory(folder)
    assert story.total_steps is None
    for step, planned in ((6, 90), (20, 50)):
        add(folder, step, 10 * step, **{"schedule/total_steps": planned})
    story.refresh()
    assert story.total_steps == 50 and story.seconds_left() == 30 * 10


def test_without_the_count_of_images_there_is_no_time_left(tmp_path: Path) -> None:
    story = RunStory(begun(tmp_path))
    for text in ("", "{", "[]", '{"train_images": "many"}'):
        (tmp_path / FILE_NAME).write_text(text)
        assert story.total_steps is None
    add(tmp_path, 2, 10)
    story.refresh()
    assert dict(story.rows())["step"] == "2"


def test_what_is_new_is_noticed_and_half_a_line_is_not(tmp_path: Path) -> None:
    story = RunStory(begun(tmp_path))
    first = story.refresh()
    add(tmp_path, 1, 1)
    second = story.refresh()
    with (tmp_path / "stats.jsonl").open("a") as file:
        file.write('{"step": 2, "train/nelb')
    assert story.refresh() == second != first
    assert story.kl() == ([0, 1, 2], [1, 1, 1])  # half of two latent channels each


def test_a_run_without_any_figures_has_rows(tmp_path: Path) -> None:
    story = RunStory(begun(tmp_path))
    story.refresh()
    rows = dict(story.rows())
    assert rows["state"] == "not training; no figures yet" and rows["newest checkpoint"] == "none yet"
    assert story.kl() is None and story.pictures() == [] and loss_chart(story.figures.series) is None


@pytest.mark.parametrize(("age_seconds", "state"), [(5, "training, or just stopped"), (5000, "not training")])
def test_the_age_of_the_figures_tells_where_nobody_is_known_to_train(
    age_seconds: float, state: str, tmp_path: Path
) -> None:
    story = RunStory(begun(tmp_path))
    add(tmp_path, 1, 1, **{"timing/sec_per_step": 2})
    then = time.time() - age_seconds
    os.utime(tmp_path / "stats.jsonl", (then, then))
    story.refresh()
    assert dict(story.rows())["state"].startswith(f"{state}; newest figures ")


def test_memory_stands_beside_its_plan(tmp_path: Path) -> None:
    story = RunStory(begun(tmp_path, predicted_allocated_bytes=3 * GIB, predicted_reserved_bytes="no number"))
    assert [row.name for row in story.memory()] == ["planned peak, allocated", "cap of the plan"]
    add(tmp_path, 1, 1, **{"memory/peak_allocated_gib": 2.5, "memory/peak_reserved_gib": 3.25})
    story.refresh()
    assert story.memory() == [
        ("planned peak, allocated", 3 * GIB, False),
        ("measured peak, allocated", 2.5 * GIB, True),
        ("measured peak, reserved", 3.25 * GIB, True),
        ("cap of the plan", 4 * GIB, False),
    ]


def test_the_newest_pictures_are_shown_and_broken_ones_are_not(tmp_path: Path) -> None:
    story = RunStory(begun(tmp_path))
    draw(tmp_path, "reals.png", "step-9-t0.7.png", "step-10-t1.0.png", "step-10-t0.7.png", "reconstructions-10.png")
    assert [drawn.caption for drawn in story.pictures()] == [
        "samples at temperature 0.7, step 10",
        "samples at temperature 1.0, step 10",
        "held-out images above their reconstructions, step 10",
    ]
    path = tmp_path / "samples" / "step-10-t0.7.png"
    path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "samples" / "step-10-t1.0.png").unlink()
    (tmp_path / "samples" / "step-10-t1.0.png").mkdir()
    assert [drawn.caption for drawn in story.pictures()] == ["held-out images above their reconstructions, step 10"]


def test_the_fall_at_the_start_does_not_flatten_the_chart() -> None:
    low = {"train/nelbo_iter": [(step, 100.0 + step % 7) for step in range(10, 101)]}
    high = {"train/nelbo_iter": [(1, 1e6), *low["train/nelbo_iter"]]}
    below, above = loss_chart(low), loss_chart(high)
    assert below is not None and above is not None and below.shape == above.shape
    blue = np.array([0x1F, 0x77, 0xB4])
    rows = [np.flatnonzero((np.abs(chart.astype(int) - blue).sum(2) < 30).sum(1)) for chart in (below, above)]
    assert np.ptp(rows[1]) > 0.5 * below.shape[0] and np.ptp(rows[0]) > 0.5 * below.shape[0]


@pytest.mark.skipif(os.name == "nt", reason="Windows locks no run")
def test_nothing_in_the_folder_of_a_run_in_training_is_touched(tmp_path: Path) -> None:
    run = demo_run(tmp_path, with_data=False)
    (tmp_path / "page").mkdir()
    with locked(run):
        draw(run, "step-3-t0.7.png")
        add(run, 3, 1)
        before = {path: path.stat() for path in sorted(run.rglob("*"))}
        story = RunStory(run)
        story.refresh()
        rows = dict(story.rows())
        assert rows["state"].startswith("training; newest figures ") and f"process {os.getpid()}" in rows["trained by"]
        assert story.pictures() and story.memory() is not None
        state = DemoState(open_run(str(run), "runs", "cpu"), tmp_path / "page")
        state.sample([0.7, 0.7], 0, 2, lambda what: lambda done, total: None)
        after = {path: path.stat() for path in sorted(run.rglob("*"))}
        assert set(after) == set(before)
        assert all((after[p].st_mtime_ns, after[p].st_size) == (s.st_mtime_ns, s.st_size) for p, s in before.items())
        assert statistics_path(tmp_path / "page", 0.7).is_file()
