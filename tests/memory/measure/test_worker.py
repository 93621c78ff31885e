"""The measuring child: what it hears and makes up, and how one ends that does not come to an end."""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CPU
from measured_runs import nano

from nvae_lowmem.commands import measure_memory as measure_command
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.memory.measure import job as measuring
from nvae_lowmem.memory.measure import worker as measure_child
from nvae_lowmem.memory.measure.assess import assess
from nvae_lowmem.memory.measure.convolutions import ConvolutionRecorder, largest_bytes, workspaces
from nvae_lowmem.memory.measure.job import Ended, Job, Outcome, measure, run_process
from nvae_lowmem.memory.measure.measurement import StepMeasurements
from nvae_lowmem.memory.measure.report import as_table, as_text
from nvae_lowmem.memory.measure.worker import synthetic_images
from nvae_lowmem.training.engines.distributed import deepspeed_available
from nvae_lowmem.training.step import Training

# --- children that do not come to an end ------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, timeout_seconds: float = 60.0) -> Outcome:
    monkeypatch.setattr(measuring, "child_command", lambda _: python(code))
    return measure(Job(name="n", profile=nano(), device="cpu", timeout_seconds=timeout_seconds), folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_child_that_is_killed_is_told_with_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys; print('@step 2', flush=True)\n"
        "print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    )
    outcome = failing(monkeypatch, tmp_path, code)
    assert outcome.status == "failed" and outcome.ended == Ended(-9, "step 2", ("last words",))
    assert "killed by SIGKILL in step 2" in outcome.detail and "host memory" in outcome.detail
    found = assess(outcome)
    assert "SIGKILL" in as_text(found) and "last words" in as_text(found) and "SIGKILL" in as_table([found])
    assert measure_command.exit_code_of([found]) == 1


def is_gone(pid: int, patience_seconds: float = 20.0) -> bool:
    """Whether the process ends; a zombie has, though nobody has asked for its exit status."""
    status = Path(f"/proc/{pid}/stat")
    give_up = time.monotonic() + patience_seconds
    while time.monotonic() < give_up:
        try:
            if status.read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_child_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess, sys, time; print('@step 1', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "sys.stderr.write(str(child.pid)); sys.stderr.flush(); time.sleep(600)"
    )
    outcome = failing(monkeypatch, tmp_path, code, timeout_seconds=1.5)
    assert outcome.ended.code is None and "timeout of 1.5 s in step 1" in outcome.detail
    if sys.platform.startswith("linux"):
        assert is_gone(int(outcome.ended.stderr[-1]))


def test_a_child_that_breaks_is_told_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = failing(monkeypatch, tmp_path, "[print(i, file=__import__('sys').stderr) for i in range(99)]; 1 / 0")
    assert outcome.detail == "ended with exit code 1 in the start"
    assert len(outcome.ended.stderr) == 12 and "ZeroDivisionError" in outcome.ended.stderr[-1]


@pytest.mark.parametrize("result", ["", "{}", '{"status": "ok"}'])
def test_a_child_that_leaves_no_readable_result_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: str
) -> None:
    """The other configurations of a matrix go on, and their rows are kept."""
    outcome = failing(monkeypatch, tmp_path, f"open({str(tmp_path / measure_child.RESULT)!r}, 'w').write({result!r})")
    assert outcome.status == "failed" and outcome.detail.startswith("left no result that can be read: ")


def test_a_child_sees_the_package_of_this_checkout(tmp_path: Path) -> None:
    code = "import nvae_lowmem.units as u, sys; sys.stderr.write(u.__file__)"
    ended = run_process(python(code), 60.0, tmp_path)
    assert Path(ended.stderr[0]).parent == Path(measuring.__file__).parents[2]


@pytest.mark.skipif(not deepspeed_available()[0], reason="DeepSpeed is not installed")
def test_the_cpu_refuses_deepspeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles.save(nano(engine="deepspeed"), tmp_path / measure_child.PROFILE)
    (tmp_path / measure_child.JOB).write_text(json.dumps({"name": "n", "device": "cpu", "steps": 3}))
    assert measure_child.main([str(tmp_path)]) == 2
    assert "--set plan.engine=torch" in capsys.readouterr().err


# --- pieces of the child ----------------------------------------------------------------------------------------------


class Notes:
    """A monitor that writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str) -> None:
        self.said.append(name)

    def checkpoint(self, name: str) -> None:
        self.said.append(f"[{name}]")

    def note_free(self, name: str) -> None: ...

    def now(self) -> float:
        return 0.0


@cache
def one_step() -> tuple[list[str], StepMeasurements, Training]:
    """What the monitor was told in a set-up and a step of two micro-batches, what they took, and the training."""
    run = measure_child.measured_run(nano(offload_optimizer=False, precision="fp32"), CPU, "torch")
    notes = Notes()
    measured, training = measure_child._run(run, "torch", CPU, notes, 1)
    assert training is not None
    return notes.said, measured, training


def test_the_monitor_hears_the_phases_of_every_micro_batch_in_order() -> None:
    said, measured, _ = one_step()
    phases = [phase for phase, _ in groupby(said)]
    passes = ["forward", "backward"]
    assert phases == ["setup", "[setup done]", *passes, *passes, "update", "[step 1]"]
    assert measured.status == "ok" and len(measured.seconds) == len(measured.host_bytes) == 1


def test_every_kind_of_convolution_of_a_step_is_run_for_its_workspaces() -> None:
    found = measure_child._convolutions(one_step()[2], 1)
    assert len(found) > 5 and len(set(found)) == len(found)
    measured = workspaces(found, CPU, lambda run: int(run() is not None))
    assert [one.convolution for one in measured] == list(map(str, found))
    assert {size for one in measured for size in one.sizes} == {1} and largest_bytes(measured) == 1


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")

    monkeypatch.setattr(measure_child, "training_step", full)
    run = measure_child.measured_run(nano(), CPU, "torch")
    measured, training = measure_child._run(run, "torch", CPU, Notes(), 3)
    assert training is None and measured.status == "out of memory"
    assert measured.detail == "in step 1: CUDA out of memory. Tried to allocate"
    assert "@step 1" in capsys.readouterr().out  # where it was, should the process not come to its end


def test_each_convolution_is_noted_once_forward_or_backward() -> None:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    with ConvolutionRecorder() as recorder:
        for stride in (1, 1, 2):
            torch.nn.functional.conv2d(x, weight, stride=stride).sum().backward()
    assert [c.options[0] for c in recorder.found] == [(1, 1), (2, 2)]
    assert x.grad is not None and str(next(iter(recorder.found))).startswith("[2, 4, 6, 6] * [8, 4, 3, 3] float32")


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_synthetic_images_are_of_the_models_kind(bits: int) -> None:
    model = ModelConfig(image_size=12, padding=2, image_channels=1 if bits == 1 else 3, bits=bits)
    x = synthetic_images(model, 0, 0, 5, CPU)
    assert x.shape == (5, model.image_channels, 16, 16) and x.dtype == torch.float32
    levels = x * (2**bits - 1)
    assert torch.equal(levels, levels.round()) and 0 <= x.min() < x.max() <= 1
    assert torch.equal(x, synthetic_images(model, 0, 0, 5, CPU))
    assert not torch.equal(x, synthetic_images(model, 1, 0, 5, CPU))
