"""Training on a card by both engines, in every precision, under every policy, wherever states lie; and going on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from card_runs import logged, needs_phantom, process, run_folder, train, write_profile
from training_runs import STEPS

pytestmark = pytest.mark.cuda

FP16 = 'plan.precision = "fp16"'
HOST = "plan.offload_optimizer = true"
DEEPSPEED = 'plan.engine = "deepspeed"'
AMPERE = ("--cc", "8.6", "--name", "NVIDIA GeForce RTX 3050 Laptop GPU")

TORCH_PLANS: dict[str, tuple[str, ...]] = {
    "fp32": ('plan.precision = "fp32"',),
    "fp16": (FP16,),
    "one pass per step": ("plan.micro_batch = 8",),
    "clipped": ("training.clip_norm = 200.0",),
    "average on the card": ("training.ema_on_host = false",),
    "states on the host": (HOST,),
    "states on the host, page-locked, fp16, clipped": (
        HOST,
        FP16,
        "plan.pin_memory = true",
        "training.clip_norm = 200.0",
    ),
    "expandable segments": ('plan.allocator_settings = "expandable_segments:True"',),
    "initialised from data": ("model.data_init = true", 'model.architecture = "res_elu"'),
}
DEEPSPEED_PLANS: dict[str, tuple[str, ...]] = {
    "0": ("plan.zero_stage = 0", 'plan.precision = "fp32"'),
    "1": ("plan.zero_stage = 1", FP16),
    "1, states on the host": ("plan.zero_stage = 1", HOST),
    "2": ("plan.zero_stage = 2", "training.clip_norm = 200.0"),
    "2, states on the host, fp16": ("plan.zero_stage = 2", HOST, FP16),
    "3": ("plan.zero_stage = 3",),
    "3, all on the host": ("plan.zero_stage = 3", HOST, "plan.offload_parameters = true"),
}


def assert_trained(profile: Path) -> None:
    """Every step has its line with the memory it took, and the last one is saved."""
    steps = {line["step"] for line in logged(profile) if line.get("memory/peak_allocated_gib", 0) > 0}
    assert steps == set(range(1, STEPS + 1))
    assert (run_folder(profile) / "checkpoints" / f"step-{STEPS:08}").is_dir()
    assert any((run_folder(profile) / "samples").iterdir())


@pytest.mark.parametrize("lines", TORCH_PLANS.values(), ids=TORCH_PLANS.keys())
def test_the_torch_engine_trains(lines: tuple[str, ...], tmp_path: Path) -> None:
    profile = write_profile(tmp_path, 'plan.engine = "torch"', *lines)
    done = train(profile)
    assert done.code == 0, done.complained
    assert_trained(profile)


@pytest.mark.parametrize("lines", DEEPSPEED_PLANS.values(), ids=DEEPSPEED_PLANS.keys())
def test_the_deepspeed_engine_trains(lines: tuple[str, ...], tmp_path: Path) -> None:
    profile = write_profile(tmp_path, DEEPSPEED, *lines)
    done = train(profile)
    assert done.code == 0, done.complained
    assert "deepspeed engine (ZeRO stage" in done.said
    assert_trained(profile)


@needs_phantom
def test_bf16_trains_where_the_card_has_it(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, 'plan.precision = "bf16"')
    refused = train(profile)
    assert refused.code == 2 and "has no bf16" in refused.complained
    done = process("launch/train.py", "--profile", profile, "--runs-dir", tmp_path / "runs", card=AMPERE)
    assert done.code == 0, done.complained
    assert_trained(profile)


def test_policies_take_less_memory_in_their_order(tmp_path: Path) -> None:
    peaks = []
    for keep in ("all", "cheap", "input", "host"):
        folder = tmp_path / keep
        folder.mkdir()
        deep = "model.groups = 10", "training.total_batch = 64", "training.steps = 1", 'plan.precision = "fp32"'
        profile = write_profile(folder, *deep, "plan.micro_batch = 64", f'plan.keep = "{keep}"')
        torch.cuda.reset_peak_memory_stats()
        done = train(profile)
        assert done.code == 0, done.complained
        peaks.append(logged(profile)[0]["memory/peak_allocated_gib"])
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


@pytest.mark.parametrize("second", ["torch", "deepspeed"])
@pytest.mark.parametrize("first", ["torch", "deepspeed"])
def test_a_run_goes_on_from_its_checkpoint_on_either_engine(first: str, second: str, tmp_path: Path) -> None:
    profile, folder = write_profile(tmp_path), tmp_path / "run"
    assert train(profile, "--run-dir", folder, "--engine", first).code == 0
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08}")
    done = train(profile, "--run-dir", folder, "--engine", second)
    assert done.code == 0, done.complained
    assert "after step 2" in done.said and (folder / "checkpoints" / "step-00000004").is_dir()
