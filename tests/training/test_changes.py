"""A run that goes on with other settings: what is said, what is kept of the old ones, what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from training_runs import run, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import TrainConfig
from nvae_lowmem.training import changes, checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(profile, folder of a run of four steps that has a checkpoint of each)."""
    root = tmp_path_factory.mktemp("finished")
    profile = write_profile(root)
    assert run(profile, "--run-dir", str(root / "run")).code == 0
    return profile, root / "run"


@pytest.fixture
def folder(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(finished[1], tmp_path / "copy")
    return tmp_path / "copy"


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(p) for p in checkpoint.all_checkpoints(folder)]


def test_what_changes_is_said_with_its_effect_and_the_old_configuration_is_kept(
    finished: tuple[Path, Path], folder: Path
) -> None:
    before = (folder / "config.toml").read_bytes()
    more = (
        "--steps",
        "6",
        "--set",
        "training.learning_rate=2e-3",
        "--set",
        "training.clip_norm=5",
        "--total-batch",
        "16",
    )
    result = run(finished[0], "--run-dir", str(folder), *more, "--set", "plan.keep='input'")
    assert (result.code, result.complained) == (0, "") and steps(folder)[-1] == 6
    for sentence in (
        "from step 5 on, training.steps 4 -> 6: the schedules of learning rate and beta stretch to the new end",
        "training.learning_rate 0.0 -> 0.002: the schedule is another one",
        "training.clip_norm 0.0 -> 5",
        "training.total_batch 8 -> 16",
        "step 5 of 6: learning rate",
    ):
        assert sentence in result.said, sentence
    assert (folder / changes.HISTORY / "until-step-00000004.toml").read_bytes() == before
    now = profiles.load(folder / "config.toml")
    assert (now.training.steps, now.training.clip_norm, now.plan.keep) == (6, 5.0, "input")
    events = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert sum(event.get("event") == "settings" for event in events) == 5


def test_the_folder_alone_goes_on_with_what_was_last_written_down(finished: tuple[Path, Path], folder: Path) -> None:
    assert run(finished[0], "--run-dir", str(folder), "--steps", "5", "--set", "training.clip_norm=5").code == 0
    result = run("", "--run-dir", str(folder), "--steps", "6")
    assert result.code == 0 and "clip_norm" not in result.said and steps(folder)[-1] == 6
    assert profiles.load(folder / "config.toml").training.clip_norm == 5
    result = run("", "--run-dir", str(folder.parent / "nowhere"))
    assert result.code == 2 and "--profile is missing" in result.complained


def test_going_on_from_a_step_sets_later_checkpoints_aside_until_training_is_there_again(
    finished: tuple[Path, Path], folder: Path
) -> None:
    every = ("--set", "training.save_every=3")
    result = run(finished[0], "--run-dir", str(folder), "--resume-from", "2", "--steps", "3", *every)
    assert result.code == 0 and "after step 2" in result.said and "set aside" in result.said
    assert steps(folder) == [1, 2, 3]
    assert [p.name for p in folder.glob("checkpoints/replaced-*")] == ["replaced-00000004"]
    assert run(finished[0], "--run-dir", str(folder)).code == 0
    assert steps(folder) == [1, 2, 3, 4] and not list(folder.glob("checkpoints/replaced-*"))


def test_nothing_that_changes_leaves_the_configuration_and_its_history_alone(
    finished: tuple[Path, Path], folder: Path
) -> None:
    shutil.rmtree(checkpoint.all_checkpoints(folder)[-1])
    before = (folder / "config.toml").read_bytes()
    assert run(finished[0], "--run-dir", str(folder)).code == 0
    assert (folder / "config.toml").read_bytes() == before and not (folder / changes.HISTORY).exists()


def test_every_key_of_training_is_free_or_has_an_effect_of_its_own() -> None:
    unknown = [
        field.name
        for field in fields(TrainConfig)
        if field.name != "init_from"  # which cannot change
        and field.name not in changes._UNSAID | changes._EFFECTS.keys()
        and not field.name.startswith(changes._SCHEDULES)
    ]
    assert unknown == []
