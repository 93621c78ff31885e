"""What the training command does around the training: folders, names, warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import run, write_profile

from nvae_lowmem.commands import auto_fit, training_run
from nvae_lowmem.commands.training_run import warning_of_bits
from nvae_lowmem.config.profile_file import load
from nvae_lowmem.data.dataset import ArrayDataset
from nvae_lowmem.data.sources import open_source


def test_what_fails_before_the_first_line_of_the_log_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(training_run.Session, "train", broken)
    with pytest.raises(ZeroDivisionError):
        run(write_profile(tmp_path), "--runs-dir", str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_has_the_name_that_was_asked_for_and_a_finished_one_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "00000-faces-again"
    asked = ["--name", "faces-again", "--steps", "1"]
    assert run(write_profile(tmp_path), *asked, "--runs-dir", str(tmp_path / "runs")).code == 0
    assert load(folder / "config.toml").name == "faces-again"
    again = run(write_profile(tmp_path), *asked, "--run-dir", str(folder))
    assert again.code == 0 and f"{folder} is already done: 1 of 1 steps" in again.said and "resuming" not in again.said
    assert "--name" in run(write_profile(tmp_path), "--name", "a/b").complained


def test_one_bit_is_for_drawings_and_photographs_are_warned_of(tmp_path: Path) -> None:
    digits = load("demo-mnist")
    assert warning_of_bits(digits, open_source(digits.data, digits.model).train) == ""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    photographs = ArrayDataset(pixels)
    assert "--set model.bits=8" in warning_of_bits(digits, photographs)
    assert warning_of_bits(replace(digits, model=replace(digits.model, bits=8)), photographs) == ""
    black_and_white = ArrayDataset((pixels // 128 * 255).astype(np.uint8))
    assert warning_of_bits(digits, black_and_white) == ""


def test_fitting_to_a_card_that_is_not_here_warns_before_the_cpu_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto_fit, "_fitted", lambda profile, gpu_mem, engine: profile)
    profile = load("demo-mnist")
    assert auto_fit.auto_fitted(profile, "4G", torch.device("cpu")) == profile
    assert "warning: torch sees no GPU here" in capsys.readouterr().err
    auto_fit.auto_fitted(profile, "4G", torch.device("cuda"))
    assert capsys.readouterr().err == ""
