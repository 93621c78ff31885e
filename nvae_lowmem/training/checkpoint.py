"""Checkpoints: one folder per save, made whole under another name and then renamed, so that none is ever half there.

checkpoints/step-00001234/
    model.safetensors      what sampling uses: averaged weights where there are any, and the buffers
    training.safetensors   what training needs to go on: weights, Adamax states, buffers, loss scale
    state.json             format version, step, and the sizes of both files
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.nvae import NVAE

FORMAT = 1
MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


def save(run_dir: Path, step: int, model: Mapping[str, Tensor], training: Mapping[str, Tensor], keep_last: int) -> Path:
    """Write a checkpoint of `step` finished optimiser steps and remove all but the newest `keep_last`."""
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"step-{step:08d}", root / f".partial-{step:08d}-{os.getpid()}"
    for leftover in root.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    _write(partial / MODEL, model)
    if training:
        _write(partial / TRAINING, training)
    sizes = {p.name: p.stat().st_size for p in partial.iterdir()}
    (partial / STATE).write_text(json.dumps({"format": FORMAT, "step": step, "bytes": sizes}, indent=1))
    _sync(partial / STATE)
    replaced = root / f".partial-old-{step:08d}-{os.getpid()}"
    if final.exists():  # the same step once more: renamed first, so that the gap is only two renames long
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(root)
    for old in all_checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def all_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, or None; broken ones are passed over."""
    for path in reversed(all_checkpoints(run_dir)):
        with contextlib.suppress(ConfigError):
            read_state(path)
            return path
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises ConfigError when it is missing, damaged, or of another version."""
    damaged = ConfigError(f"checkpoint {checkpoint}: {STATE} or a file it names is missing or damaged")
    try:
        state = json.loads((checkpoint / STATE).read_text())
        version = state["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged from None
    if version != FORMAT:
        raise ConfigError(
            f"checkpoint {checkpoint} has format {version!r}; this version reads {FORMAT}: "
            "use the version of nvae-lowmem that wrote it"
        )
    try:
        int(state["step"])
        whole = all((checkpoint / name).stat().st_size == size for name, size in state["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if not whole:
        raise ConfigError(f"checkpoint {checkpoint}: a file is truncated; delete the folder to use an older one")
    return state


def load_training(checkpoint: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(finished steps, engine state, the model's state that sampling uses), on the host."""
    step = int(read_state(checkpoint)["step"])
    if not (checkpoint / TRAINING).is_file():
        raise ConfigError(f"checkpoint {checkpoint} holds weights only: training cannot be resumed from it")
    return step, _read(checkpoint / TRAINING), _read(checkpoint / MODEL)


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> tuple[Profile, NVAE, Path]:
    """(profile, model with the averaged weights in evaluation mode, checkpoint folder) of a run's newest checkpoint."""
    profile = profiles.load(run_dir / "config.toml")
    checkpoint = newest(run_dir)
    if checkpoint is None:
        for refused in reversed(all_checkpoints(run_dir)):
            read_state(refused)  # says why
        raise ConfigError(f"run {run_dir} has no whole checkpoint: train it first, or name another run with --run")
    model = NVAE(profile.model)
    model.load_state_dict(_matching(model, _read(checkpoint / MODEL), checkpoint))
    return profile, model.to(device).eval(), checkpoint


def export_weights(run_dir: str | os.PathLike[str], profile: Profile, state: Mapping[str, Tensor]) -> Path:
    """Make a run folder that can be sampled from, out of a model's state_dict alone. Returns the checkpoint."""
    root = Path(run_dir)
    if (root / "config.toml").exists():
        raise ConfigError(f"--out {root}: there is a run already; name another folder")
    profiles.save(profile, root / "config.toml")
    return save(root, 0, state, {}, keep_last=1)


def _matching(model: NVAE, state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    expected = model.state_dict()
    wrong = [k for k in expected if k not in state or state[k].shape != expected[k].shape]
    wrong += [k for k in state if k not in expected]
    if wrong:
        shown = ", ".join(wrong[:5])
        raise ConfigError(f"{where}: {len(wrong)} tensors do not belong to the model of config.toml (first: {shown})")
    return state


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    _sync(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _sync(path: Path) -> None:
    """Make sure the bytes are on the disk before anything is renamed over them."""
    with contextlib.suppress(OSError):  # folders cannot be opened on Windows
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
