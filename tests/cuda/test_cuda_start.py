"""How runs start on a card: with a cap, with averaging, under each engine without a launcher, on the card of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from card_runs import CAP_BYTES, logged, process, train, write_profile

from nvae_lowmem.training.open_run import choose_device

pytestmark = pytest.mark.cuda


def test_a_cap_of_the_plan_comes_into_force(tmp_path: Path) -> None:
    done = train(write_profile(tmp_path, f"plan.cap_bytes = {CAP_BYTES}"))
    assert done.code == 0, done.complained
    assert "memory cap 1.00 GiB of" in done.said
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(CAP_BYTES + 1, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_engine_brings_all_of_the_objective_to_the_card(decay: float, tmp_path: Path) -> None:
    """With averaging the model is there before; the loss's own buffers still have to follow."""
    profile = write_profile(tmp_path, f"training.ema_decay = {decay}")
    done = train(profile)
    assert done.code == 0, done.complained
    assert len(logged(profile)) > 0


def test_deepspeed_starts_without_a_launcher(tmp_path: Path) -> None:
    done = train(write_profile(tmp_path), "--engine", "deepspeed", "--set", "plan.zero_stage=2")
    assert done.code == 0, done.complained
    assert "deepspeed engine (ZeRO stage 2) on cuda" in done.said


def test_a_process_of_several_takes_the_card_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


def test_averaging_under_stage_3_can_be_measured(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, "plan.engine = 'deepspeed'", "plan.zero_stage = 3")
    done = process("tools/measure_memory.py", "--profile", profile, "--steps", "3", "--out", tmp_path / "measured")
    assert done.code == 0, done.said + done.complained
