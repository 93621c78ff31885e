"""Which checkpoints of a run are kept, which are used, and what interrupted saves and removals leave behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.checkpoint_files import MODEL, STATE, TRAINING, NotFinite


def save(run: Path, step: int, keep_last: int = 2, nelbo: float | None = None) -> Path:
    tensors = {"w": torch.full((100,), float(step))}
    figures = {} if nelbo is None else {checkpoint.HELD_OUT_FIGURE: nelbo}
    return checkpoint.save(run, step, tensors, tensors, keep_last, figures)


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(run)]


def cut(path: Path, name: str = TRAINING) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-1])


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2])
def test_saving_on_from_an_older_checkpoint_never_leaves_the_run_without_a_whole_one(
    tmp_path: Path, keep_last: int
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    cut(tmp_path / "checkpoints" / "step-00000030")
    for step in (22, 24, 26):
        saved = save(tmp_path, step, keep_last)
        assert checkpoint.newest(tmp_path) == saved
    assert 30 in steps(tmp_path) and len(steps(tmp_path)) == keep_last + 1  # the broken one counts for nothing
    assert save(tmp_path, 30, keep_last) == checkpoint.newest(tmp_path)


@pytest.mark.parametrize("stray", ["step-99999999", "step-00000007.bak", "step-00000002-copy", "notes"])
def test_what_a_person_put_beside_the_checkpoints_neither_counts_nor_goes(tmp_path: Path, stray: str) -> None:
    first = save(tmp_path, 1)
    shutil.copytree(first, first.with_name(stray))
    (first.with_name("step-00000009")).write_text("a file, not a folder")
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert (first.with_name(stray) / MODEL).exists() and first.with_name("step-00000009").exists()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000004" and {3, 4} <= set(steps(tmp_path))


def test_the_best_one_and_the_last_before_an_alarm_are_never_rotated_away(tmp_path: Path) -> None:
    for step, nelbo in ((1, 90.0), (2, 70.0), (3, 80.0)):
        save(tmp_path, step, nelbo=nelbo)
    marked = checkpoint.mark_before_alarm(tmp_path, 3, "gradient norm of step 4")
    assert marked is not None and (marked / checkpoint.BEFORE_ALARM).read_text() == "gradient norm of step 4\n"
    for step in (4, 5, 6, 7):
        save(tmp_path, step, nelbo=75.0)
    assert steps(tmp_path) == [2, 3, 6, 7]
    checkpoint.mark_before_alarm(tmp_path, 6, "another alarm")
    save(tmp_path, 8, nelbo=60.0)
    assert steps(tmp_path) == [6, 7, 8]


def test_checkpoints_after_the_step_gone_back_to_are_set_aside_until_training_has_got_there(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    moved = checkpoint.replace_after(tmp_path, 10)
    assert [p.name for p in moved] == ["replaced-00000020", "replaced-00000030"] and steps(tmp_path) == [10]
    save(tmp_path, 25, keep_last=3)
    assert [p.exists() for p in moved] == [False, True]
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-00000025"


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_kill_between_the_two_renames_of_a_step_saved_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    save(tmp_path, 5, keep_last=1)
    real, done = os.replace, []

    def killed_after(*arguments: Path) -> None:
        if len(done) == left:
            os._exit(9)
        done.append(arguments)
        real(*arguments)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "replace", killed_after)
        save(tmp_path, 5, keep_last=1)
        os._exit(0)
    os.waitpid(child, 0)
    checkpoint.tidy(tmp_path)
    assert steps(tmp_path) == [5] and checkpoint.load_training(tmp_path / "checkpoints" / "step-00000005")[0] == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005"]


def test_half_a_save_half_a_removal_and_half_a_picture_are_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 5)
    root = tmp_path / "checkpoints"
    for name in (".partial-00000006-77", ".removed-step-00000004-77"):
        (root / name).mkdir()
        (root / name / MODEL).write_bytes(b"half")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".reals.png-8912").write_bytes(b"half")
    (tmp_path / "samples" / "reals.png").write_bytes(b"whole")
    assert checkpoint.tidy(tmp_path) == [] and [p.name for p in root.iterdir()] == ["step-00000005"]
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["reals.png"]


def test_a_whole_save_that_lacked_only_its_name_is_adopted_and_said(tmp_path: Path) -> None:
    save(tmp_path, 5)
    whole = save(tmp_path, 6)
    os.replace(whole, whole.with_name(".partial-00000006-4711"))
    (said,) = checkpoint.tidy(tmp_path)
    assert said.startswith("adopted") and str(whole) in said and checkpoint.newest(tmp_path) == whole


# --- damage -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from([MODEL, TRAINING, STATE]), bit=st.integers(0, 1 << 20))
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, name: str, bit: int) -> None:
    path = save(tmp_path_factory.mktemp("run"), 3)
    flip(path / name, bit)
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_training(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        checkpoint.check_checkpoint(path)


def bad_states(good: str) -> dict[str, str]:
    table = json.loads(good)
    return {
        "negative": json.dumps({"format": 1, "step": -5, "bytes": {MODEL: table["files"][MODEL]["bytes"]}}),
        "infinite": '{"format": 1, "step": 1e400, "bytes": {}}',
        "fraction": json.dumps({"format": 1, "step": 3.9, "bytes": {MODEL: table["files"][MODEL]["bytes"]}}),
        "huge": json.dumps({"format": 1, "step": 10**30, "bytes": {MODEL: table["files"][MODEL]["bytes"]}}),
        "another step": json.dumps({"format": 1, "step": 4, "bytes": {MODEL: table["files"][MODEL]["bytes"]}}),
        "no files": '{"format": 1, "step": 3, "bytes": {}}',
        "a file elsewhere": '{"format": 1, "step": 3, "bytes": {"../../config.toml": 3}}',
        "nested": "[" * 100_000 + "]" * 100_000,
        "digits": '{"format": 1, "step": ' + "9" * 5000 + "}",
        "large": good + " " * (1 << 21),
        "true": '{"format": true, "step": 3, "bytes": {}}',
    }


@pytest.mark.parametrize("name", list(bad_states(json.dumps({"files": {MODEL: {"bytes": 1}}}))))
def test_a_hostile_state_is_one_message(tmp_path: Path, name: str) -> None:
    older, path = save(tmp_path, 2), save(tmp_path, 3)
    (path / STATE).write_text(bad_states((path / STATE).read_text())[name])
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_training(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert checkpoint.newest(tmp_path) == older


def test_a_checkpoint_of_the_earlier_format_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    sizes = {name: (path / name).stat().st_size for name in (MODEL, TRAINING)}
    (path / STATE).write_text(json.dumps({"format": 1, "step": 3, "bytes": sizes}))
    assert checkpoint.load_training(path)[0] == 3 and checkpoint.check_checkpoint(path) == "sizes and numbers"


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    good = {"w": torch.ones(3)}
    for value in (float("nan"), float("inf"), float("-inf")):
        bad: dict[str, Tensor] = {"v": torch.ones(2), "w": torch.tensor([1.0, value, 1.0])}
        for model, training in ((bad, good), (good, bad)):
            with pytest.raises(NotFinite, match=r"1 of 2 tensors .*first: w"):
                checkpoint.save(tmp_path, 2, model, training, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [before.name]


def test_checkpoints_that_are_a_file_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(ConfigError, match="must be a folder of checkpoints"):
        checkpoint.all_checkpoints(tmp_path)
