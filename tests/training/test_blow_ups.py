"""Trainings that blow up: what they go back to, what they do otherwise from there, and what they end with."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import run, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.data.pipeline import Batches
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.learning_rate import suggest_learning_rate
from nvae_lowmem.training.resolve import resolve_run
from nvae_lowmem.training.rewind import RECORD, SEED_STRIDE, Rewind, after_rewinds, rewind_text, rewinds

STEPS = 8
QUIET = ("--set", "training.evaluate_every=4", "--set", "training.sample_every=1000", "--set", "training.save_every=2")


def profile(folder: Path, steps: int = STEPS, rate: float = 1e-3) -> Path:
    return write_profile(folder, steps=f"steps = {steps}", ema_decay=f"ema_decay = 0.5\nlearning_rate = {rate}")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == kind]


def rates(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [line["train/lr"] for line in lines if "train/lr" in line]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every batch of these steps of the run's first order holds NaN."""
    steps: list[int] = []
    real = Batches.batch

    def poisoned(self: Batches, step: int, sample_slice: slice) -> Tensor:
        x = real(self, step, sample_slice)
        return torch.full_like(x, float("nan")) if step in steps and self._seed < SEED_STRIDE else x

    monkeypatch.setattr(Batches, "batch", poisoned)
    return steps


def test_a_poisoned_batch_is_gone_back_from_with_half_the_learning_rate_and_other_noise(
    tmp_path: Path, poison: list[int]
) -> None:
    poison.append(5)
    folder = tmp_path / "run"
    result = run(profile(tmp_path), "--run-dir", str(folder), *QUIET)
    assert (result.code, result.complained) == (0, "")
    assert "going back to the checkpoint of step 4, with a peak learning rate of 0.0005" in result.said
    assert "The images themselves hold inf or NaN" in result.said
    (record,) = rewinds(folder)
    assert (record.step, record.back_to, record.peak_rate) == (6, 4, 1e-3)
    assert [e["step"] for e in events(folder, "diverged")] == [6] and len(events(folder, "rewind")) == 1
    found = rates(folder)
    assert len(found) == STEPS and max(found[:4]) > 2 * max(found[4:]) * 0.9 and max(found[4:]) <= 5e-4
    assert checkpoint.step_of(checkpoint.all_checkpoints(folder)[-1]) == STEPS
    assert profiles.load(folder / "config.toml").training.seed == 1  # what was asked for stays what is written down


def test_without_a_checkpoint_training_begins_anew(tmp_path: Path, poison: list[int]) -> None:
    poison.append(1)
    folder = tmp_path / "run"
    result = run(profile(tmp_path), "--run-dir", str(folder), *QUIET)
    assert result.code == 0 and "going back to the initial weights" in result.said
    assert [r.back_to for r in rewinds(folder)] == [0]


def test_no_rewind_ends_with_exit_code_4_and_the_place(tmp_path: Path, poison: list[int]) -> None:
    poison.append(5)
    folder = tmp_path / "run"
    result = run(profile(tmp_path), "--run-dir", str(folder), "--no-rewind", *QUIET)
    assert result.code == 4 and result.complained.startswith("train.py: step 6: the loss is nan")
    assert result.complained.count("\n") == 1 and not (folder / RECORD).exists()
    assert [checkpoint.step_of(p) for p in checkpoint.all_checkpoints(folder)] == [2, 4]


def test_a_run_goes_on_after_a_rewind_as_it_would_have_unkilled(tmp_path: Path, poison: list[int]) -> None:
    poison.append(5)
    folders = [tmp_path / "one", tmp_path / "two"]
    path = profile(tmp_path)
    for folder in folders:
        assert run(path, "--run-dir", str(folder), *QUIET).code == 0
    checkpoint.replace_after(folders[1], 6)  # as if killed after step 6
    result = run(path, "--run-dir", str(folders[1]), *QUIET)
    assert result.code == 0 and "after step 6" in result.said
    ends = [checkpoint.load_training(checkpoint.all_checkpoints(f)[-1])[1] for f in folders]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_a_learning_rate_no_weights_survive_ends_after_three_rewinds_and_saves_nothing_bad(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = profile(tmp_path)
    assert run(path, "--run-dir", str(folder), *QUIET).code == 0
    rate = ("--set", "training.learning_rate=1000", "--set", "training.learning_rate_min=1000", "--steps", "16")
    result = run(path, "--run-dir", str(folder), *QUIET, *rate)
    assert result.code == 4 and "Training went back 3 times" in result.complained
    assert [r.back_to for r in rewinds(folder)] == [8, 8, 8] and result.complained.count("\n") == 1
    newest = checkpoint.all_checkpoints(folder)[-1]
    assert checkpoint.step_of(newest) == 8 and checkpoint.is_undamaged(newest)
    result = run(path, "--run-dir", str(folder), *QUIET, "--steps", "12")  # the advice can be followed
    assert result.code == 0 and "training.learning_rate 1000.0 -> 0.001" in result.said


def test_rewinds_at_a_rate_that_was_set_anew_do_not_halve_it(tmp_path: Path, poison: list[int]) -> None:
    poison.append(5)
    folder, path = tmp_path / "run", profile(tmp_path)
    assert run(path, "--run-dir", str(folder), *QUIET).code == 0
    result = run(path, "--run-dir", str(folder), *QUIET, "--steps", "10", "--set", "training.learning_rate=2e-3")
    assert result.code == 0 and "step 9 of 10: learning rate" in result.said
    assert rates(folder)[8] > 1e-4


def test_a_gradient_that_is_too_large_is_skipped_counted_and_not_for_ever(tmp_path: Path) -> None:
    folder, path = tmp_path / "run", profile(tmp_path, steps=4)
    result = run(path, "--run-dir", str(folder), *QUIET, "--set", "training.skip_gradient_norm=1e-6")
    assert result.code == 0 and "skipped 4" in result.said
    saved = [checkpoint.load_training(p)[1] for p in checkpoint.all_checkpoints(folder)]
    weights = [name for name in saved[0] if name.startswith("weight.")]
    assert all(torch.equal(saved[0][name], saved[-1][name]) for name in weights)
    result = run(path, "--run-dir", str(folder), *QUIET, "--set", "training.skip_gradient_norm=1e-6", "--steps", "60")
    assert result.code == 4 and "steps were skipped" in result.complained


def test_an_overflow_storm_is_gone_back_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 4 on every gradient of the first engine overflows, whatever the loss scale."""
    engines: list[TorchEngine] = []
    real, calls = TorchEngine.backward, [0]

    def backward(self: TorchEngine, loss: Tensor, last: bool) -> None:
        if self not in engines:
            engines.append(self)
        calls[0] += 1
        real(self, loss * 1e38 * 1e38 if self is engines[0] and calls[0] > 6 else loss, last)

    monkeypatch.setattr(TorchEngine, "backward", backward)
    folder = tmp_path / "run"
    result = run(profile(tmp_path, steps=60), "--run-dir", str(folder), "--precision", "fp16", *QUIET)
    assert (result.code, result.complained) == (0, "") and len(engines) == 2
    assert "50 steps in a row had a gradient that is not finite" in result.said and len(rewinds(folder)) == 1


def test_what_blew_up_is_gone_from_memory_before_training_goes_on(
    tmp_path: Path, poison: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models and their optimisers at once would not fit the card that one was planned for."""
    poison.append(5)
    models: list[weakref.ref[NVAE]] = []
    real = TorchEngine.__init__

    def watched(self: TorchEngine, objective: Any, *arguments: Any) -> None:
        assert [ref() for ref in models] == [None] * len(models)
        models.append(weakref.ref(objective.model))
        real(self, objective, *arguments)

    monkeypatch.setattr(TorchEngine, "__init__", watched)
    result = run(profile(tmp_path), "--run-dir", str(tmp_path / "run"), *QUIET)
    assert (result.code, result.complained) == (0, "") and len(models) == 2


def test_where_nothing_good_was_ever_reached_the_rate_is_at_most_the_advised_one() -> None:
    """Half of 3 is as hopeless as 3; for a total batch of 32 about 3.5e-3 is advised."""
    given = profiles.override(profiles.load("demo-mnist"), ["training.learning_rate=3"])
    planned = resolve_run(given, 4500, torch.device("cpu"), 1)
    from_start = Rewind(step=221, back_to=0, peak_rate=3.0, why="")
    later = Rewind(step=400, back_to=350, peak_rate=3.0, why="")
    advised = suggest_learning_rate(32, 256, 1e-2)[0]

    def rate(*made: Rewind) -> float:
        return after_rewinds(planned, made).schedule.peak_rate

    assert (rate(), rate(later), rate(from_start), rate(from_start, later)) == (3.0, 1.5, advised, advised / 2)
    assert "the one advised for this batch" in rewind_text(from_start, after_rewinds(planned, [from_start]))
    low = resolve_run(profiles.override(given, ["training.learning_rate=1e-3"]), 4500, torch.device("cpu"), 1)
    assert after_rewinds(low, [replace(from_start, peak_rate=1e-3)]).schedule.peak_rate == 5e-4
