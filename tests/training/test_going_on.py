"""What a training does with the run folder that it finds: damaged checkpoints, foreign ones, another process."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import STEPS, run, tree, write_profile

from nvae_lowmem.commands import check
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.checkpoint_files import MODEL, STATE, TRAINING


class Trained(NamedTuple):
    """A finished run with a checkpoint of every step."""

    profile: Path
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    profile = write_profile(root)
    assert run(profile, "--run-dir", str(root / "run")).code == 0
    return Trained(profile, root / "run")


def copy(trained: Trained, tmp_path: Path, steps: int) -> Path:
    """The run as if it had been killed after `steps`."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder)
    for path in checkpoint.all_checkpoints(folder)[steps:]:
        shutil.rmtree(path)
    return folder


def flip(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 4
    file.write_bytes(content)


def same_end(trained: Trained, folder: Path) -> bool:
    ends = [checkpoint.load_training(checkpoint.all_checkpoints(f)[-1])[1] for f in (trained.folder, folder)]
    return all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


@pytest.mark.parametrize("name", [MODEL, TRAINING, STATE])
def test_a_flipped_bit_is_named_and_the_older_checkpoint_leads_to_the_same_end(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    folder = copy(trained, tmp_path, 3)
    flip(checkpoint.all_checkpoints(folder)[-1] / name, 0.75)
    result = run(trained.profile, "--run-dir", str(folder))
    assert result.code == 0 and f"resuming {folder} after step 2" in result.said
    assert f"passed over: checkpoint {folder / 'checkpoints' / 'step-00000003'}" in result.said and name in result.said
    assert same_end(trained, folder)


@pytest.mark.parametrize("damage", ["cut", "newer format", "empty folders"])
def test_a_run_whose_checkpoints_are_all_unusable_is_refused_and_left_as_it_is(
    trained: Trained, tmp_path: Path, damage: str
) -> None:
    folder = copy(trained, tmp_path, 2)
    for path in checkpoint.all_checkpoints(folder):
        if damage == "cut":
            (path / TRAINING).write_bytes((path / TRAINING).read_bytes()[:100])
        elif damage == "newer format":
            (path / STATE).write_text('{"format": 3}')
        else:
            shutil.rmtree(path)
            path.mkdir()
    before = tree(folder / "checkpoints"), (folder / "log.txt").read_bytes()
    result = run(trained.profile, "--run-dir", str(folder))
    assert result.code == 2 and "none of the 2 checkpoints" in result.complained
    assert "step-00000001" in result.complained and result.complained.count("\n") == 1
    assert (tree(folder / "checkpoints"), (folder / "log.txt").read_bytes()) == before


@pytest.mark.parametrize("change", ["missing", "shape", "inf"])
def test_a_checkpoint_that_is_not_this_models_or_not_finite_is_passed_over(
    trained: Trained, tmp_path: Path, change: str
) -> None:
    folder = copy(trained, tmp_path, 3)
    path = checkpoint.all_checkpoints(folder)[-1]
    state = load_file(path / TRAINING)
    name = next(key for key in state if key.startswith("exp_avg."))
    if change == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3, 3, 3) if change == "shape" else torch.full_like(state[name], float("inf"))
    save_file(state, path / TRAINING)
    sizes = {n: (path / n).stat().st_size for n in (MODEL, TRAINING)}
    (path / STATE).write_text(f'{{"format": 1, "step": 3, "bytes": {sizes}}}'.replace("'", '"'))
    result = run(trained.profile, "--run-dir", str(folder))
    assert result.code == 0 and "after step 2" in result.said and name in result.said
    assert same_end(trained, folder)


def test_a_finished_run_started_again_saves_nothing_twice(trained: Trained, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path, STEPS)
    before = {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}
    assert run(trained.profile, "--run-dir", str(folder)).code == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")} == before


def hold(folder: Path, held: object, done: object) -> None:
    with runs.locked(folder):
        held.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


def test_a_second_training_in_a_folder_is_refused_with_the_first_ones_name(trained: Trained, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path, 2)
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    child = context.Process(target=hold, args=(folder, held, done))
    child.start()
    try:
        assert held.wait(60)
        before = tree(folder)
        result = run(trained.profile, "--run-dir", str(folder))
        assert result.code == 2 and f"is being trained in by process {child.pid} on" in result.complained
        assert tree(folder) == before
    finally:
        done.set()
        child.join(60)
    assert run(trained.profile, "--run-dir", str(folder)).code == 0


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / runs.LOCK).symlink_to(precious)
    with pytest.raises(ConfigError, match="nothing can be written there"), runs.locked(tmp_path):
        pass
    assert precious.read_text() == "keep me"


def test_names_of_runs_are_made_safe_for_folders(tmp_path: Path) -> None:
    folder = runs.new_run(tmp_path, "<script>alert('hi')</script>\x1b[31m")
    assert folder.name == "00000-script-alert-hi-script-31m"
    (folder / "config.toml").touch()
    assert runs.find_run("<script>alert('hi')</script>\x1b[31m", tmp_path) == folder


# --- the check --------------------------------------------------------------------------------------------------------


def test_a_check_names_every_damaged_file(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(trained, tmp_path, 3)
    before = tree(folder)
    assert check.main([str(folder)]) == 0 and tree(folder) == before
    assert capsys.readouterr().out.count("whole (sizes, checksums and numbers)") == 3
    flip(folder / "checkpoints" / "step-00000003" / MODEL, 0.5)
    (folder / "stats.jsonl").write_text("[" * 100_000)
    assert check.main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.count("DAMAGED") == 2 and f"{MODEL} is damaged: its SHA-256" in said
    assert "newest whole checkpoint: step-00000002" in said


def test_a_check_of_no_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(tmp_path)]) == 2 and "no run folder" in capsys.readouterr().err
