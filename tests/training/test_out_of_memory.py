"""What a person reads when memory runs out in training, and the plan that --auto-fit makes instead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Finished, run, tree, write_profile

from nvae_lowmem.commands import auto_fit
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import MemoryPlan, Profile
from nvae_lowmem.errors import ExitCode
from nvae_lowmem.generation import grids
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, trainer
from nvae_lowmem.training.engines.host_adamax import HostAdamax
from nvae_lowmem.training.out_of_memory import is_out_of_memory, next_settings

CUDA = "CUDA out of memory. Tried to allocate 42.00 MiB. GPU 0 has a total capacity of 3.94 GiB"


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.cuda.OutOfMemoryError(CUDA)


def block_fails(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """That block of every model made from now on runs out of memory in its call number `call` (from 1)."""
    made, calls = NVAE.__init__, [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == call:
            exhausted()

    def init(self: NVAE, *args: Any) -> None:
        made(self, *args)
        self.blocks[name].register_forward_pre_hook(hook)

    monkeypatch.setattr(NVAE, "__init__", init)


def report_of(result: Finished) -> str:
    assert result.code == ExitCode.OUT_OF_MEMORY == 5 and "Traceback" not in result.complained
    return result.complained


def test_the_report_names_phase_block_size_plan_and_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_fails(monkeypatch, "dec_0_1", call=1)
    made = {"predicted_allocated_bytes": 3 << 29, "predicted_reserved_bytes": 2 << 30}
    profile = profiles.load(write_profile(tmp_path))
    profiles.save(replace(profile.with_plan(cap_bytes=3 << 30), provenance=made), tmp_path / "fitted.toml")
    said = report_of(run(tmp_path / "fitted.toml", "--runs-dir", str(tmp_path / "runs")))
    assert "out of memory in the forward pass, block dec_0_1, which wanted 42.00 MiB more" in said
    assert "cap 3.00 GiB, predicted allocated peak 1.50 GiB, predicted reserved peak 2.00 GiB" in said
    assert "plan.keep=input" in said and "offload_optimizer=true" in said and "--auto-fit" in said


def test_a_recomputed_block_fails_in_the_backward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block_fails(monkeypatch, "enc_0_0", call=3)  # two micro-batches: forward, again in backward, forward
    place = str(tmp_path / "runs")
    whole = report_of(run(write_profile(tmp_path), "--runs-dir", place, "--set", "plan.keep=input"))
    assert "in the forward pass, block enc_0_0" in whole
    monkeypatch.undo()
    block_fails(monkeypatch, "enc_0_0", call=2)
    again = report_of(run(write_profile(tmp_path), "--runs-dir", place, "--set", "plan.keep=input"))
    assert "in the backward pass, block enc_0_0" in again


@pytest.mark.parametrize(
    ("owner", "function", "place"),
    [
        (HostAdamax, "step", "the update of the weights"),
        (trainer, "validate", "the evaluation"),
        (grids, "preview", "the sample pictures"),
        (checkpoint, "save", "the checkpoint"),
    ],
)
def test_other_places_are_named_too(
    owner: Any, function: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, function, exhausted)
    said = report_of(run(write_profile(tmp_path), "--runs-dir", str(tmp_path / "runs")))
    assert f"out of memory in {place}," in said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError(CUDA), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory is a good film"), False),
    ],
)
def test_only_errors_about_memory_are_taken_for_it(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_settings_come_in_the_order_of_their_cost_and_end_where_nothing_is_left() -> None:
    def flags(**plan: Any) -> list[str]:
        return [s.split()[0] + " " + s.split()[1] for s in next_settings(Profile(plan=MemoryPlan(**plan)))]

    keep, offload, host, last = (
        "--set plan.keep=input",
        "--set plan.offload_optimizer=true",
        "--set plan.keep=host",
        "fewer groups",
    )
    assert flags(micro_batch=16) == [keep, offload, "--micro-batch 8", host, last]
    assert flags(micro_batch=1, keep="input", keep_blocks={"head": "cheap"}) == [keep, offload, host, last]
    assert flags(micro_batch=25, keep="input", offload_optimizer=True) == ["--micro-batch 10", host, last]
    assert flags(micro_batch=1, keep="host", offload_optimizer=True) == [last]


# --- --auto-fit -------------------------------------------------------------------------------------------------------


def test_auto_fit_trains_under_the_plan_it_found(tmp_path: Path) -> None:
    result = run(
        write_profile(tmp_path, steps="steps = 1"),
        "--runs-dir",
        str(tmp_path / "runs"),
        "--auto-fit",
        "--gpu-mem",
        "2G",
    )
    assert result.code == 0, result.complained
    assert "fitted to" in result.said and "blocks keep" in result.said
    (folder,) = (tmp_path / "runs").iterdir()
    trained = profiles.load(folder / "config.toml")
    assert 0 < trained.plan.cap_bytes < 2 << 30 and trained.provenance["predicted_allocated_bytes"] > 0
    assert trained.training.total_batch == 8 and 8 % trained.plan.micro_batch == 0
    assert trained.plan.precision == "fp32"  # the card's precision would only be slow on the CPU
    assert json.loads((folder / "stats.jsonl").read_text().splitlines()[0])["memory/predicted_gib"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--auto-fit"], ["--gpu-mem 4G"]),
        (["--gpu-mem", "4G"], ["--auto-fit"]),
        (["--auto-fit", "--gpu-mem", "4X"], ["--gpu-mem", "4X"]),
        (["--auto-fit", "--gpu-mem", "900G"], ["no card has that"]),
    ],
)
def test_what_cannot_be_fitted_to_is_said_at_once(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    result = run(write_profile(tmp_path), "--runs-dir", str(tmp_path / "runs"), *arguments)
    assert result.code == ExitCode.BAD_INPUT and all(word in result.complained for word in words), result.complained
    assert not (tmp_path / "runs").exists()


def test_where_nothing_fits_the_nearest_miss_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_fit, "HOST_SHARE", 1e-9)
    before = tree(tmp_path)
    result = run(write_profile(tmp_path), "--runs-dir", str(tmp_path / "runs"), "--auto-fit", "--gpu-mem", "1G")
    assert result.code == ExitCode.DOES_NOT_FIT and "nearest miss" in result.complained, result.complained
    assert set(tree(tmp_path)) - set(before) == {"quick.toml"}


def test_auto_fit_refuses_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(write_profile(tmp_path), "--auto-fit", "--gpu-mem", "4G")
    assert result.code == ExitCode.BAD_INPUT and "tools/fit_memory.py" in result.complained
