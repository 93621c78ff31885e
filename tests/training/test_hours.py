"""The training command with hours: a real training by a clock that its own steps move."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import run, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.errors import Diverged
from nvae_lowmem.memory.plan.duration import step_time
from nvae_lowmem.training import checkpoint, pace, trainer
from nvae_lowmem.training.speed import Expected

STEP, EVALUATION, SAVE = 4.0, 0.5, 0.25
SECONDS = 120


class Clock:
    """The time of a training: so much for a step, an evaluation, a save; `factor` makes steps slower."""

    def __init__(self) -> None:
        self.now, self.factor, self.at_step = time.monotonic(), 1.0, dict[int, Callable[[], None]]()

    def monotonic(self) -> float:
        return self.now

    def moved_by(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds * (self.factor if seconds == STEP else 1)
            if seconds == STEP and (event := self.at_step.pop(args[2] + 1, None)):
                event()
            return function(*args, **kwargs)

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=made.monotonic))
    monkeypatch.setattr(trainer, "training_step", made.moved_by(trainer.training_step, STEP))
    monkeypatch.setattr(trainer, "validate", made.moved_by(trainer.validate, EVALUATION))
    monkeypatch.setattr(checkpoint, "save", made.moved_by(checkpoint.save, SAVE))
    return made


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Saves and evaluations go by time; pictures, which would take the test most of its own, do not."""
    return write_profile(
        tmp_path, evaluate_every="evaluate_every = 0", sample_every="sample_every = 1000", save_every="save_every = 0"
    )


def train(profile: Path, clock: Clock, folder: Path, *more: str, seconds: float = SECONDS) -> tuple[float, str]:
    """(seconds that the training took, what it said)."""
    clock.now = began = time.monotonic()
    result = run(profile, "--run-dir", str(folder), "--minutes", str(seconds / 60), *more)
    assert result.code in (0, 143), result.complained
    return clock.now - began, result.said


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def rates(folder: Path) -> list[float]:
    return [record["train/lr"] for record in records(folder) if "train/lr" in record]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_ends_at_its_hour_with_its_schedules(profile: Path, clock: Clock, tmp_path: Path) -> None:
    took, said = train(profile, clock, tmp_path / "run")
    assert took == pytest.approx(SECONDS, rel=0.05)
    found = rates(tmp_path / "run")
    assert len(found) == pytest.approx((SECONDS - 10 * EVALUATION - 10 * SAVE) / STEP, abs=3)
    assert found[-1] == pytest.approx(1e-4, rel=0.05) and found[1] > 10 * found[-1]
    assert "steps in all instead of" in said and "training ends about" in said
    held_out = [record["step"] for record in records(tmp_path / "run") if "val/nelbo" in record]
    assert len(held_out) == 10 and held_out[-1] == len(found)
    plans = [record for record in records(tmp_path / "run") if record.get("event") == "schedule"]
    totals = [r["schedule/total_steps"] for r in records(tmp_path / "run") if "schedule/total_steps" in r]
    assert 1 <= len(plans) <= 4 and totals[-1] == len(found)
    (newest,) = checkpoint.all_checkpoints(tmp_path / "run")[-1:]
    assert checkpoint.step_of(newest) == len(found)
    again, said = train(profile, clock, tmp_path / "run")
    assert "is already done" in said and again < 1


def test_stopped_and_resumed_on_a_slower_machine_it_ends_at_its_hour(
    profile: Path, clock: Clock, tmp_path: Path
) -> None:
    clock.at_step[8] = stop
    first, said = train(profile, clock, tmp_path / "run")
    assert "stopped after step 8" in said and first < SECONDS / 2
    clock.factor = 1.7
    second, said = train(profile, clock, tmp_path / "run")
    assert "resuming" in said and first + second == pytest.approx(SECONDS, rel=0.05)
    found = rates(tmp_path / "run")
    jumps = [abs(a - b) for a, b in pairwise(found[7:])]
    assert max(jumps) < 0.25 * found[0] and found[-1] == pytest.approx(1e-4, rel=0.05)


def test_other_hours_are_said_and_stretch_the_schedule(profile: Path, clock: Clock, tmp_path: Path) -> None:
    first, _ = train(profile, clock, tmp_path / "run")
    before = len(rates(tmp_path / "run"))
    second, said = train(profile, clock, tmp_path / "run", seconds=2 * SECONDS)
    assert first + second == pytest.approx(2 * SECONDS, rel=0.05)
    assert f"training.hours {SECONDS / 3600} -> {2 * SECONDS / 3600}: the schedules" in said
    assert max(rates(tmp_path / "run")[before + 7 :]) > 2e-4


def test_resumed_from_an_earlier_step_it_has_the_time_that_was_left_there(
    profile: Path, clock: Clock, tmp_path: Path
) -> None:
    train(profile, clock, tmp_path / "run", "--set", "training.keep_last=99")
    earlier = checkpoint.step_of(checkpoint.all_checkpoints(tmp_path / "run")[4])
    took, _ = train(profile, clock, tmp_path / "run", "--set", "training.keep_last=99", "--resume-from", str(earlier))
    assert took == pytest.approx(SECONDS / 2, rel=0.1)


def test_after_a_rewind_it_ends_at_the_same_hour(profile: Path, clock: Clock, tmp_path: Path) -> None:
    def blow_up() -> None:
        raise Diverged("the loss is nan", 16, 15)

    clock.at_step[16] = blow_up
    took, said = train(profile, clock, tmp_path / "run")
    assert "going back to the checkpoint of step" in said and took == pytest.approx(SECONDS, rel=0.05)


def test_without_hours_a_checkpoint_knows_no_time(clock: Clock, tmp_path: Path) -> None:
    assert run(write_profile(tmp_path), "--run-dir", str(tmp_path / "run")).code == 0
    _, training, _ = checkpoint.load_training(checkpoint.all_checkpoints(tmp_path / "run")[-1])
    assert not [name for name in training if "time" in name or "knots" in name]
    assert profiles.load(tmp_path / "run" / "config.toml").training.hours == 0


def test_a_long_training_saves_every_half_hour(clock: Clock, tmp_path: Path) -> None:
    clock.factor = 150  # ten minutes a step
    path = write_profile(
        tmp_path, save_every="save_every = 0", steps="steps = 20", evaluate_every="evaluate_every = 20"
    )
    assert run(path, "--run-dir", str(tmp_path / "run"), "--set", "training.sample_every=20").code == 0
    saved = [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(tmp_path / "run")]
    assert len(saved) == 10 and saved[-1] == 20  # kept are the newest ten
    assert {b - a for a, b in pairwise(saved)} <= {1, 2}  # every second step, and every third


def test_the_end_is_said_after_a_few_steps_and_the_speed_is_kept_in_the_run(clock: Clock, tmp_path: Path) -> None:
    path = write_profile(tmp_path, steps="steps = 12", sample_every="sample_every = 12")
    path.write_text(path.read_text() + "\n[provenance]\ncard = 'gtx-970'\npredicted_seconds_per_step = 0.5\n")
    folder = tmp_path / "run"
    assert run(path, "--run-dir", str(folder)).code == 0
    (said,) = [record["text"] for record in records(folder) if record.get("event") == "speed"]
    assert f"{STEP:g} s per step on the CPU" in said and "s without pictures. 0.5 to" in said
    assert "with 6 steps left, training ends about" in said
    assert "0.5 to 2.1 s were estimated for NVIDIA GeForce GTX 970, which this is not" in said
    assert f"it takes {STEP / 2.1:.2f} times the most of that" in said
    made = profiles.load(folder / "config.toml")
    time = step_time(made)
    assert time is not None and time.least_seconds == pytest.approx(STEP) and "the CPU" in time.measured_on
    assert (folder / "config.toml").read_text().startswith("# nvae-lowmem run run\n")
    assert step_time(profiles.override(made, ["training.total_batch=4"])) is None
    more = run(folder / "config.toml", "--run-dir", str(folder), "--steps", "20")
    said = [record["text"] for record in records(folder) if record.get("event") == "speed"][-1]
    assert more.code == 0 and f"{STEP:g} s were measured before on the CPU" in said and said.endswith("as expected")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0.40 times the least of that"), (0.7, "as expected"), (4.2, "2.00 times the most")]
)
def test_how_far_an_estimate_was_off(seconds: float, words: str) -> None:
    expected = Expected(least_seconds=0.5, most_seconds=2.1, device="NVIDIA GeForce GTX 970")
    assert "0.5 to 2.1 s were estimated for NVIDIA GeForce GTX 970: " in expected.beside(seconds)
    assert words in expected.beside(seconds)
