"""Caps that are too small for a phase: one report that names it, and advice that is not followed already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from card_runs import needs_phantom, process, write_profile
from training_runs import Finished

from nvae_lowmem.errors import ExitCode
from nvae_lowmem.units import MIB

pytestmark = pytest.mark.cuda

# 4.8 million parameters: weights 18 MiB, gradients as much, Adamax states 37 MiB
HEAVY = (
    "model.channels_encoder = 128",
    "model.channels_decoder = 128",
    "training.total_batch = 2",
    "plan.micro_batch = 2",
)
# 8,558 parameters, and 256 images in a pass, of which each block keeps its input only
WIDE = ("training.total_batch = 256", "plan.micro_batch = 256", 'plan.keep = "input"', 'plan.precision = "fp32"')
CASES = {
    "the set-up": (HEAVY, 12, ["fewer groups"], ["plan.keep", "offload_optimizer", "--micro-batch"]),
    "the forward pass": (WIDE, 40, ["offload_optimizer", "--micro-batch 128"], ["plan.keep=input"]),
    "the backward pass": (HEAVY, 40, ["plan.keep=input", "offload_optimizer"], []),
    "the update of the weights": (HEAVY, 92, ["offload_optimizer"], ["plan.keep", "--micro-batch"]),
}


def train(profile: Path, *arguments: str, card: Sequence[str] = ()) -> Finished:
    """The training command in a process of its own: what others have left on the card would count against the cap."""
    return process(
        "launch/train.py", "--profile", profile, "--runs-dir", profile.parent / "runs", *arguments, card=card
    )


@pytest.mark.parametrize("phase", CASES)
def test_a_cap_too_small_is_reported_with_what_helps_there(phase: str, tmp_path: Path) -> None:
    lines, cap_mib, advised, not_advised = CASES[phase]
    done = train(write_profile(tmp_path, *lines, 'plan.engine = "torch"', f"plan.cap_bytes = {cap_mib * MIB}"))
    assert done.code == ExitCode.OUT_OF_MEMORY, done.said + done.complained
    assert f"out of GPU memory in {phase}" in done.complained and "Traceback" not in done.complained
    assert f"cap {cap_mib}.0 MiB" in done.complained and "allocated peak" in done.complained
    assert all(words in done.complained for words in advised), done.complained
    assert not any(words in done.complained for words in not_advised), done.complained


def test_what_is_on_the_host_already_is_not_advised(tmp_path: Path) -> None:
    lines = (*HEAVY, "plan.offload_optimizer = true", f"plan.cap_bytes = {44 * MIB}")
    for engine in ("torch", "deepspeed"):
        done = train(write_profile(tmp_path, *lines, f'plan.engine = "{engine}"'))
        assert done.code == ExitCode.OUT_OF_MEMORY and "offload_optimizer" not in done.complained, done.complained


def test_deepspeed_runs_out_in_its_set_up(tmp_path: Path) -> None:
    """It copies the weights, which moving them to the host avoids."""
    done = train(
        write_profile(tmp_path, *HEAVY, f"plan.cap_bytes = {44 * MIB}"),
        "--engine",
        "deepspeed",
        "--set",
        "plan.zero_stage=2",
    )
    assert done.code == ExitCode.OUT_OF_MEMORY, done.said + done.complained
    assert "out of GPU memory in the set-up" in done.complained and "plan.offload_optimizer=true" in done.complained
    assert "plan.keep" not in done.complained


@needs_phantom
def test_other_programs_on_the_card_are_named_first(tmp_path: Path) -> None:
    done = train(write_profile(tmp_path), card=("--others", "4132000000"))
    assert done.code == ExitCode.OUT_OF_MEMORY, done.said + done.complained
    first = done.complained.partition("try next: ")[2]
    assert first.startswith("close the other programs on the card, which take 3.85 GiB"), done.complained
