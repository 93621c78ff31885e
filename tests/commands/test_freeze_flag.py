"""`train --freeze`: what is frozen stays to the last bit, also after a stop, and is said; mistakes are answered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_runs import run, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.checkpoint_files import MODEL, TRAINING

ENCODER = ("stem", "pre_*", "enc_*", "top")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(profile, the run trained with its encoder frozen)."""
    root = tmp_path_factory.mktemp("frozen")
    profile = write_profile(root)
    result = run(profile, "--run-dir", str(root / "run"), "--freeze", *ENCODER)
    assert result.code == 0 and "frozen: 5 of 10 blocks" in result.said, result
    return profile, root / "run"


def tensors(run_dir: Path, which: int, file: str = TRAINING) -> dict[str, Tensor]:
    return load_file(checkpoint.all_checkpoints(run_dir)[which] / file)


def of_the_encoder(name: str) -> bool:
    return any(f"blocks.{block}" in name for block in ("stem.", "pre_", "enc_", "top."))


def test_the_frozen_stand_still_in_weights_averages_and_statistics(frozen: tuple[Path, Path]) -> None:
    for file in (MODEL, TRAINING):
        first, last = (tensors(frozen[1], which, file) for which in (0, -1))
        weights = {name for name in first if name.startswith(("weight.", "buffer.", "blocks."))}
        moved = {name for name in weights if not torch.equal(first[name], last[name])}
        assert moved and not any(map(of_the_encoder, moved))
        assert any(map(of_the_encoder, weights))
    assert not [name for name in last if name.startswith("exp_") and of_the_encoder(name)]
    assert profiles.load(frozen[1] / "config.toml").training.freeze == ENCODER


def test_a_stopped_run_goes_on_to_the_same_end(frozen: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "halves"
    shutil.copytree(frozen[1], folder)
    for path in checkpoint.all_checkpoints(folder)[2:]:
        shutil.rmtree(path)
    assert run(frozen[0], "--run-dir", str(folder), "--freeze", *ENCODER).code == 0
    ends = [tensors(path, -1) for path in (folder, frozen[1])]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


@pytest.mark.parametrize(("before", "after"), [(ENCODER, ("head",)), (ENCODER, ())])
def test_other_blocks_may_be_frozen_on_the_way(
    frozen: tuple[Path, Path], tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(frozen[1], folder)
    flag = ("--freeze", *after) if after else ("--set", "training.freeze=[]")
    result = run(frozen[0], "--run-dir", str(folder), "--set", "training.steps=6", *flag)
    assert result.code == 0 and "training.freeze" in result.said, result
    old, new = (tensors(path, -1) for path in (frozen[1], folder))
    moved = {name for name in old if name.startswith("weight.") and not torch.equal(old[name], new[name])}
    assert any(map(of_the_encoder, moved)) and any("blocks.head" in name for name in moved) == (not after)
    averages = tensors(folder, -1, MODEL)
    still = [name for name in averages if "blocks.head" in name and f"weight.{name}" in new] if after else []
    assert all(torch.equal(averages[name], new[f"weight.{name}"]) for name in still)


def test_mistakes_are_answered_before_anything_is_written(tmp_path: Path) -> None:
    profile = write_profile(tmp_path)
    for freeze, told in (("encoder*", "names 'encoder*', a block that this model does not have"), ("*", "every block")):
        result = run(profile, "--run-dir", str(tmp_path / "new"), "--freeze", freeze)
        assert result.code == 2 and told in result.complained and "Traceback" not in result.complained
        assert not (tmp_path / "new").exists()
