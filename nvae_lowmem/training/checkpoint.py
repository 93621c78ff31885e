"""The checkpoints of a run: saved whole or not at all, kept by merit, found again whatever happened to the newest.

checkpoints/
    step-00001234/         a checkpoint (its files: checkpoint_files.py); a copy under any other name is the user's own
        before-alarm.txt   if there: the last one before an alarm, never rotated away
    .partial-...           a save under way; one that is whole is adopted by the next training, others are removed
    .removed-...           a removal under way
    replaced-00001300      newer than the state training went back to; removed when training is past its step again
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.checkpoint_files import (
    MODEL,
    TRAINING,
    read_state,
    read_tensors,
    sync,
    verify,
    write_checkpoint,
)
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.engines.torch_engine import GOOD_STEPS, persistent_buffers

T = TypeVar("T")

HELD_OUT_FIGURE = "val/nelbo"
"""The figure by which the best checkpoint is known: held-out -ELBO in nats per image."""
BEFORE_ALARM = "before-alarm.txt"
_OWN_NAME = re.compile(r"(step|replaced)-(\d{8,})")
_PARTIAL_NAME = re.compile(r"\.partial-(?:old-)?(\d{8,})-\d+")


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What training goes on from, on the host."""

    path: Path
    step: int
    training: dict[str, Tensor]
    weights: dict[str, Tensor]
    """The model's state that sampling uses."""
    figures: Mapping[str, float]
    passed_over: tuple[str, ...]
    """Why newer checkpoints were not used, a sentence each."""


# --- which there are --------------------------------------------------------------------------------------------------


def all_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first; nothing but folders with names of our own.

    Raises ConfigError where `checkpoints` cannot be read as a folder.
    """
    return _own_folders(run_dir, "step")


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are there in their sizes, or None; broken ones are passed over."""
    return next((path for path in reversed(all_checkpoints(run_dir)) if is_whole(path)), None)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's files are all there, in their sizes; their contents are not looked at."""
    try:
        read_state(path, step_of(path))
    except ConfigError:
        return False
    return True


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name. Raises ConfigError for a folder of another name."""
    match = _OWN_NAME.fullmatch(path.name)
    if match is None:
        raise ConfigError(f"{path} is no checkpoint: their folders are called step-00001234")
    return int(match[2])


def _own_folders(run_dir: Path, kind: str) -> list[Path]:
    root = run_dir / "checkpoints"
    try:
        found = [p for p in root.iterdir() if (m := _OWN_NAME.fullmatch(p.name)) and m[1] == kind and p.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{root} must be a folder of checkpoints: {error.strerror or error}") from None
    return sorted(found, key=step_of)


# --- saving -----------------------------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    step: int,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    keep_last: int,
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Write a checkpoint of `step` finished optimiser steps, then remove what `prune` would.

    figures: held-out figures of this very step; HELD_OUT_FIGURE says which checkpoint is the best.
    Raises NotFinite and OSError; whatever is raised, the checkpoints that there were are untouched.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".partial-{step:08d}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_checkpoint(partial, step, model, training, figures)
        final = _put_in_place(partial, step)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    prune(run_dir, step, keep_last)
    return final


def prune(run_dir: Path, step: int, keep_last: int) -> None:
    """Remove the checkpoints that nobody needs, now that one of `step` is there.

    Kept: the newest `keep_last` whole ones up to `step`, the best one, the last one before an alarm, broken ones (they
    count for nothing and may be mended), and every one of a later step, which only a person can have meant to keep.
    """
    states = {}
    for path in all_checkpoints(run_dir):
        with contextlib.suppress(ConfigError):
            if step_of(path) <= step:
                states[path] = read_state(path, step_of(path))
    judged = [path for path, state in states.items() if HELD_OUT_FIGURE in state.figures]
    kept = {*list(states)[-keep_last:], *(p for p in states if (p / BEFORE_ALARM).exists())}
    if judged:
        kept.add(min(judged, key=lambda path: states[path].figures[HELD_OUT_FIGURE]))
    superseded = [path for path in _own_folders(run_dir, "replaced") if step_of(path) <= step]
    for path in [*(p for p in states if p not in kept), *superseded]:
        _remove(path)


def mark_before_alarm(run_dir: Path, step: int, why: str) -> Path | None:
    """Mark the newest whole checkpoint up to `step`, instead of the one marked before; the marked one, if any."""
    good = [path for path in all_checkpoints(run_dir) if step_of(path) <= step and is_whole(path)]
    if not good:
        return None
    (good[-1] / BEFORE_ALARM).write_text(why + "\n", encoding="utf-8")
    for path in all_checkpoints(run_dir):
        if path != good[-1]:
            (path / BEFORE_ALARM).unlink(missing_ok=True)
    return good[-1]


def replace_after(run_dir: Path, step: int) -> list[Path]:
    """Set the checkpoints of later steps aside, because training goes on from `step`; their new paths."""
    moved = []
    for path in all_checkpoints(run_dir):
        if step_of(path) > step:
            aside = path.with_name(path.name.replace("step-", "replaced-"))
            if aside.exists():
                _remove(aside)
            os.replace(path, aside)
            moved.append(aside)
    return moved


def tidy(run_dir: Path) -> list[str]:
    """Finish what an interrupted save or removal left behind; sentences on what was found.

    Only for the process that holds the run's lock: a save of a process that lives would be torn apart.
    """
    root, said = run_dir / "checkpoints", []
    for partial in sorted(p for p in root.glob(".partial-*") if p.is_dir()) if root.is_dir() else []:
        match = _PARTIAL_NAME.fullmatch(partial.name)
        with contextlib.suppress(ConfigError):
            if match and not is_whole(root / f"step-{int(match[1]):08d}"):
                read_state(partial, int(match[1]))
                said.append(f"adopted {_put_in_place(partial, int(match[1]))}, whose save was interrupted at the end")
                continue
        shutil.rmtree(partial, ignore_errors=True)
    for removed in root.glob(".removed-*"):
        shutil.rmtree(removed, ignore_errors=True)
    for picture in (run_dir / "samples").glob(".*.png-*"):
        with contextlib.suppress(OSError):
            picture.unlink()
    return said


def _put_in_place(partial: Path, step: int) -> Path:
    """Rename a whole checkpoint to its name; one that is there already gives way, and the gap is two renames long."""
    final = partial.with_name(f"step-{step:08d}")
    replaced = partial.with_name(f".partial-old-{step:08d}-{os.getpid()}")
    if final.exists():
        os.replace(final, replaced)  # should the next rename never come to pass, `tidy` adopts one of the two
    os.replace(partial, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that no half of it is ever taken for a damaged one."""
    removed = path.with_name(f".removed-{path.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


# --- going on ---------------------------------------------------------------------------------------------------------


def resume(run_dir: Path, model: NVAE, step: int | None = None) -> Resumed | None:
    """The newest checkpoint of a run that training can go on from, or the one of `step`; None if there is none at all.

    Whatever is wrong with a newer one (cut off, a flipped bit, inf or NaN, tensors of another model) is explained in
    `passed_over`. Raises ConfigError when there are checkpoints and none of them can be used, and when the one of
    `step` cannot.
    """
    candidates = all_checkpoints(run_dir)
    if step is not None:
        steps = [step_of(path) for path in candidates]
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"--resume-from {step}: {run_dir} has no checkpoint of that step; there are: {known}")
        candidates = [path for path in candidates if step_of(path) == step]
    elif not candidates:
        return None
    (path, (training, weights)), passed_over = _first_usable(candidates, lambda p: _load_matching(p, model))
    state = read_state(path)
    return Resumed(
        path=path,
        step=state.step,
        training=training,
        weights=weights,
        figures=state.figures,
        passed_over=passed_over,
    )


def load_training(checkpoint: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(finished steps, engine state, the model's state that sampling uses), on the host; checksums are checked.

    Raises ConfigError for a checkpoint that is not whole, and for one of weights only.
    """
    state = read_state(checkpoint, step_of(checkpoint))
    if TRAINING not in state.files:
        raise ConfigError(f"checkpoint {checkpoint} holds weights only: training cannot be resumed from it")
    return state.step, read_tensors(checkpoint, state, TRAINING), read_tensors(checkpoint, state, MODEL)


def load_run(run_dir: Path, say: Callable[[str], None] = print) -> tuple[Profile, NVAE, Path]:
    """(profile, model with the averaged weights in evaluation mode, checkpoint folder) of a run's newest checkpoint.

    say: receives a sentence for each newer checkpoint that is damaged. Raises ConfigError when none can be used.
    """
    profile = profiles.load(run_dir / "config.toml")
    candidates = all_checkpoints(run_dir)
    if not candidates:
        raise ConfigError(f"run {run_dir} has no whole checkpoint: train it first, or name another run with --run")
    model = NVAE(profile.model)

    def load(path: Path) -> dict[str, Tensor]:
        return _matching(model.state_dict(), read_tensors(path, read_state(path, step_of(path)), MODEL), path)

    (path, weights), passed_over = _first_usable(candidates, load)
    for sentence in passed_over:
        say(f"passed over: {sentence}")
    model.load_state_dict(weights)
    return profile, model.eval(), path


def export_weights(run_dir: str | os.PathLike[str], profile: Profile, state: Mapping[str, Tensor]) -> Path:
    """Make a run folder that can be sampled from, out of a model's state_dict alone. Returns the checkpoint."""
    root = Path(run_dir)
    if (root / "config.toml").exists():
        raise ConfigError(f"--out {root}: there is a run already; name another folder")
    profiles.save(profile, root / "config.toml")
    return save(root, 0, state, {}, keep_last=1)


def check_checkpoint(path: Path) -> str:
    """Check every file of a checkpoint against its record; what was checked, in words. Raises ConfigError."""
    state = read_state(path, step_of(path))
    verify(path, state)
    for name in state.files:
        read_tensors(path, state, name)
    return "sizes, checksums and numbers" if all(f.sha256 for f in state.files.values()) else "sizes and numbers"


def is_undamaged(path: Path) -> bool:
    """Whether `check_checkpoint` finds no fault."""
    try:
        check_checkpoint(path)
    except ConfigError:
        return False
    return True


def _first_usable(candidates: list[Path], load: Callable[[Path], T]) -> tuple[tuple[Path, T], tuple[str, ...]]:
    """(newest checkpoint that loads, what it gave), and why the newer ones do not. Raises ConfigError if none does."""
    problems: list[str] = []
    for path in reversed(candidates):
        try:
            return (path, load(path)), tuple(problems)
        except ConfigError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise ConfigError(f"{problems[0]}; there is no older one. Mend it, or name another folder to start anew")
    raise ConfigError(
        f"none of the {len(problems)} checkpoints in {candidates[0].parent} can be used: {'; '.join(problems)}. "
        "Mend one, or name another folder to start anew"
    )


def _load_matching(path: Path, model: NVAE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(engine state, averaged weights) that fit the model. Raises ConfigError."""
    _, training, weights = load_training(path)
    expected = {f"buffer.{name}": t for name, t in persistent_buffers(model).items()}
    expected |= {f"weight.{name}": p for name, p in model.named_parameters()}
    updated = {_block_of(name) for name in training if name.startswith("exp_avg.")}  # not before a step, not if frozen
    for name, p in model.named_parameters():
        if _block_of(f"weight.{name}") in updated:
            expected |= {f"exp_avg.{name}": p, f"exp_inf.{name}": p, f"step.{name}": torch.zeros(())}
    single = {name: torch.zeros(()) for name in ("loss_scale", GOOD_STEPS) if name in training}
    by_name = ("buffer.", "weight.", "exp_avg.", "exp_inf.", "step.", *single)
    _matching(expected | single, {k: v for k, v in training.items() if k.startswith(by_name)}, path)
    distributed.check_statistics(model, training, path)
    return training, _matching(model.state_dict(), weights, path)


def _block_of(name: str) -> str:
    """The block of a tensor in an engine's state: "dec_0_1" of "exp_avg.blocks.dec_0_1.prior.weight"."""
    return ".".join(name.split(".")[2:3])


def _matching(expected: Mapping[str, Tensor], state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    wrong = list(_differing(expected, state))
    if wrong:
        shown = ", ".join(wrong[:5])
        raise ConfigError(f"{where}: {len(wrong)} tensors do not belong to the model of config.toml (first: {shown})")
    return state


def _differing(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (k for k in expected if k not in state or state[k].shape != expected[k].shape)
    yield from (k for k in state if k not in expected)
