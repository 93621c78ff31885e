"""A disk that is full, or a folder that is gone, at every kind of file: training goes on, or stops with a message."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from training_runs import run, write_profile

from nvae_lowmem.generation import grids
from nvae_lowmem.training import checkpoint, checkpoint_files, monitor


class Disk:
    """Writes fail while it is full."""

    def __init__(self) -> None:
        self.full = False

    def guard(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return write


@pytest.fixture
def disk() -> Disk:
    return Disk()


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(p) for p in checkpoint.all_checkpoints(folder)]


def test_a_disk_that_is_full_for_a_while_costs_only_the_checkpoints_of_that_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    real, saves = checkpoint.write_checkpoint, []

    def writes(folder: Path, step: int, *rest: Any) -> None:
        saves.append(step)
        disk.full = step in (2, 3)
        real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", writes)
    monkeypatch.setattr(safetensors.torch, "save_file", disk.guard(safetensors.torch.save_file))
    result = run(write_profile(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert (result.code, result.complained) == (0, "") and saves == [1, 2, 3, 4]
    assert steps(tmp_path / "run") == [1, 4]
    assert (
        "step 2: the checkpoint cannot be written: [Errno 28]" in result.said
        and "newest checkpoint is of step 1" in result.said
    )
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_a_disk_that_stays_full_ends_in_one_message_and_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    profile, folder = write_profile(tmp_path), tmp_path / "run"
    assert run(profile, "--run-dir", str(folder), "--steps", "2").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, "_write_tensors", disk.guard(checkpoint_files._write_tensors))
        disk.full = True
        result = run(profile, "--run-dir", str(folder), "--steps", "4")
    assert result.code == 2 and result.complained.count("\n") == 1
    assert "newest checkpoint is of step 2" in result.complained and "Make room" in result.complained
    assert steps(folder) == [1, 2] and checkpoint.is_undamaged(checkpoint.all_checkpoints(folder)[-1])
    assert run(profile, "--run-dir", str(folder), "--steps", "4").code == 0 and steps(folder)[-1] == 4


def test_figures_logs_and_pictures_that_cannot_be_written_do_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    disk.full = True
    monkeypatch.setattr(monitor, "append_line", disk.guard(monitor.append_line))
    monkeypatch.setattr(grids, "save_png", disk.guard(grids.save_png))
    result = run(write_profile(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert result.code == 0 and steps(tmp_path / "run") == [1, 2, 3, 4]
    assert "lines for log.txt are lost: [Errno 28]" in result.complained and "no pictures" in result.said
    assert "Traceback" not in result.complained


def test_tensorboard_gets_a_new_file_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.tensorflow_stub.io.gfile import GFile

    monkeypatch.setattr(GFile, "write", disk.guard(GFile.write))
    monkeypatch.setattr(GFile, "flush", disk.guard(GFile.flush))
    with monitor.Monitor(tmp_path, 9) as written:
        for step in range(1, 10):
            disk.full = step in (4, 5)
            written.scalars(step, {"a": 1.0 * step})
        disk.full = False
    found = [e.step for file in sorted(tmp_path.glob("events.*")) for e in _scalars(EventAccumulator(str(file)))]
    assert {1, 2, 3, 6, 7, 8, 9} <= set(found)


def _scalars(events: Any) -> list[Any]:
    events.Reload()
    return events.Scalars("a") if "a" in events.Tags()["scalars"] else []


def test_a_run_folder_that_is_removed_meanwhile_is_one_message_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.write_checkpoint

    def writes(folder: Path, step: int, *rest: Any) -> None:
        if step == 3:
            shutil.rmtree(tmp_path / "run")
        real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", writes)
    result = run(write_profile(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert result.code in (0, 2) and "Traceback" not in result.complained
    assert steps(tmp_path / "run") == [4]
