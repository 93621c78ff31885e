"""What is known of the card before and while training: doctor, NVML, other programs, plans for it, several cards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from card_runs import ON_PHANTOM, logged, needs_phantom, process, run, run_folder, train, write_profile
from zero_worker import free_port

from nvae_lowmem.commands import doctor
from nvae_lowmem.config import profile_file as profiles

pytestmark = pytest.mark.cuda
AUTO_FIT = ("launch/train.py", "--steps", "1", "--auto-fit")


def test_the_doctor_sees_the_card() -> None:
    done = run(doctor.main)
    assert "0 FAIL" in done.said, done.said
    assert torch.cuda.get_device_name(0) in done.said and "this torch runs on it" in done.said
    if ON_PHANTOM:  # its convolutions give zeros, which is what the self-test is there to find
        assert "fp16 convolutions on cuda are off by" in done.said


def test_training_notes_who_uses_the_card(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    assert train(profile).code == 0
    line = logged(profile)[0]
    assert line["memory/card_used_gib"] >= line["memory/peak_reserved_gib"] > 0
    assert line["memory/process_gib"] > 0 and line["memory/others_gib"] >= 0


@needs_phantom
def test_without_nvml_all_works_but_what_it_would_tell(tmp_path: Path) -> None:
    profile, card = write_profile(tmp_path), ("--nvml", "0")
    done = process("launch/train.py", "--profile", profile, "--runs-dir", tmp_path / "runs", card=card)
    assert done.code == 0, done.complained
    line = logged(profile)[0]
    assert line["memory/peak_allocated_gib"] > 0 and "memory/card_used_gib" not in line
    asked = process("tools/doctor.py", card=card)
    assert "cannot be asked: Driver Not Loaded" in asked.said and " 0 FAIL" in asked.said


def test_auto_fit_plans_for_the_card_that_is_there(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    done = train(profile, *AUTO_FIT[1:])
    assert done.code == 0, done.complained
    plan = profiles.load(run_folder(profile) / "config.toml").plan
    assert 0 < plan.cap_bytes < torch.cuda.mem_get_info()[1]
    assert f"of {torch.cuda.get_device_name(0)}" in done.said or "fitted to" in done.said


@needs_phantom
def test_a_plan_leaves_other_programs_what_they_have(tmp_path: Path) -> None:
    caps = []
    for others in (0, 1 << 30):
        folder = tmp_path / str(others)
        folder.mkdir()
        profile = write_profile(folder)
        done = process(*AUTO_FIT, "--profile", profile, "--runs-dir", folder / "runs", card=("--others", str(others)))
        assert done.code == 0, done.complained
        caps.append(profiles.load(run_folder(profile) / "config.toml").plan.cap_bytes)
    assert 0 < caps[1] < caps[0]


@needs_phantom
@pytest.mark.parametrize("stage", [0, 2])
def test_two_processes_train_on_two_cards(stage: int, tmp_path: Path) -> None:
    # Saved at the end only: on the phantom, whether a step counts as an overflow may differ between processes, and a
    # checkpoint before any step that counted would have nothing to exchange in one of them.
    profile = write_profile(
        tmp_path,
        f"plan.zero_stage = {stage}",
        "plan.micro_batch = 2",
        'plan.precision = "fp32"',
        "training.save_every = 4",
    )
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    command = ("launch/train.py", "--profile", profile, "--runs-dir", tmp_path / "runs")
    done = process(*launcher, *command, card=("--cards", "2"))
    assert done.code == 0, done.said + done.complained
    assert f"deepspeed engine (ZeRO stage {stage}) on cuda: a launcher started 2 processes" in done.said
    assert "x processes 2" in done.said and logged(profile)


@needs_phantom
def test_more_processes_than_cards_are_refused(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = process("launch/train.py", "--profile", profile, "--runs-dir", tmp_path / "runs", **launched)
    assert done.code == 2 and "has no GPU of its own, there are 1" in done.complained
