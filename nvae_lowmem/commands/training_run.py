"""A training from its profile to a finished run. Every problem is found before anything is written."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nvae_lowmem.commands.auto_fit import auto_fitted
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.choices import DeviceChoice
from nvae_lowmem.config.sections import EngineName, MemoryPlan, Profile
from nvae_lowmem.data.fingerprint import record_or_compare
from nvae_lowmem.data.pipeline import Batches
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.errors import ConfigError, OutOfMemory, command_line
from nvae_lowmem.generation.grids import training_pictures
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.memory.plan.duration import expected
from nvae_lowmem.model.keep import check_block_names
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.batch_split import split_batch
from nvae_lowmem.training.build import build_model, build_training, engine_factory
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.open_run import choose_device
from nvae_lowmem.training.out_of_memory import is_out_of_memory, report
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run
from nvae_lowmem.training.trainer import Trainer

# what may differ when a run goes on: how memory is used, and how often the run reports
_FREE_TO_CHANGE = {"plan", "provenance", "name"}
_FREE_TRAINING = {
    "log_every",
    "sample_every",
    "evaluate_every",
    "evaluate_images",
    "save_every",
    "keep_last",
    "ema_on_host",
}


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where a run is written to, as the flags of the same names say."""

    run_dir: str
    """Exactly this folder, and its run goes on; empty: a new numbered one."""
    runs_dir: str
    resume: Literal["auto", "never"]

    def made(self, profile: Profile) -> Path:
        """The folder, made if need be; that of an earlier run must have the same configuration. Raises ConfigError."""
        if not self.run_dir:
            return runs.new_run(self.runs_dir, profile.name)
        folder = Path(self.run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--run-dir {folder}: cannot be made: {error.strerror or error}") from None
        if checkpoint.newest(folder) is None:
            return folder
        if self.resume == "never":
            raise ConfigError(f"--run-dir {folder} holds a checkpoint and --resume is never: name another folder")
        changed = changed_keys(profiles.load(folder / "config.toml").with_absolute_paths(), profile)
        if changed:
            raise ConfigError(
                f"--run-dir {folder} was trained with another configuration; these differ: {', '.join(changed)}. "
                "Set them back, or name another folder"
            )
        return folder


def train(
    profile: Profile,
    folder: Folder,
    *,
    device: DeviceChoice = "auto",
    auto_fit: bool = False,
    gpu_mem: str = "",
    dry_run: bool = False,
    local_rank: int = -1,
) -> None:
    """Train, or with dry_run only print what would be trained.

    Raises ConfigError, NothingFits, Diverged, OutOfMemory; what was not begun leaves no folder behind.
    """
    where = choose_device(device)
    if auto_fit:
        profile = auto_fitted(profile, gpu_mem, where)
    cuda_memory.prepare_environment(profile.plan)
    if where.type == "cpu":
        keep_freed_memory()
    split_batch(profile, distributed.launched_processes())
    data = open_source(profile.data, profile.model, log=print if distributed.launched_rank() == 0 else _silent)
    engine_name, why_engine = distributed.choose_engine(profile.plan, distributed.launched(), where)
    rank, world_size = 0, 1
    if engine_name == "deepspeed" and not dry_run:
        rank, world_size, where = distributed.initialise(where, local_rank if local_rank >= 0 else None)
    run = resolve_run(profile, len(data.train), where, world_size)
    reasons = (
        data.description,
        why_engine,
        *run.reasons,
        expected(run.profile, len(data.train)) if dry_run or where.type == "cuda" else "",
        cuda_memory.apply_memory_cap(profile.plan, where),
        _policies(profile.plan),
    )
    run = replace(run, reasons=tuple(reason for reason in reasons if reason))
    with torch.device("meta") if dry_run else contextlib.nullcontext():  # a dry run allocates nothing
        model = build_model(profile)
    check_block_names(model, profile.plan)
    if rank == 0:
        print(_summary(run, model), flush=True)
    if dry_run:
        print(profiles.dumps(run.profile))
        return
    try:
        _train_on(folder, run, data, model, engine_name, where, rank)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(report(error, run.profile, model.blocks, where)) from None
    finally:
        distributed.shutdown()


def _train_on(
    where: Folder,
    run: ResolvedRun,
    data: Datasets,
    model: NVAE,
    engine_name: EngineName,
    device: torch.device,
    rank: int,
) -> None:
    run_dir = Path(distributed.broadcast_object(str(where.made(run.profile)) if rank == 0 else ""))
    try:
        with runs.locked(run_dir) if rank == 0 else contextlib.nullcontext():
            resumed = _resumed(run_dir, model, rank)
            if resumed is not None and resumed.step >= run.schedule.total_steps:
                if rank == 0:
                    print(f"{run_dir} is already done: {resumed.step} steps of {run.schedule.total_steps}")
            else:
                _train_in(run_dir, resumed, run, data, model, engine_name, device, rank)
            if rank == 0:
                samples = f"sample more with: {command_line('sample')} --run {run_dir}"
                print(f"pictures: {run_dir / 'samples'}\n{samples}", flush=True)
    except BaseException:
        if rank == 0 and not where.run_dir:
            runs.remove_unused(run_dir)
        raise


def _resumed(run_dir: Path, model: NVAE, rank: int) -> checkpoint.Resumed | None:
    """What training goes on from, in every process the same; rank 0 decides and says why it is not a newer one."""
    found = None
    if rank == 0:
        for sentence in checkpoint.tidy(run_dir):
            print(sentence, flush=True)
        found = checkpoint.resume(run_dir, model)
        for sentence in found.passed_over if found is not None else ():
            print(f"passed over: {sentence}", flush=True)
    step = distributed.broadcast_object(found.step if found is not None else None)
    return checkpoint.resume(run_dir, model, step) if rank and step is not None else found


def _train_in(
    run_dir: Path,
    resumed: checkpoint.Resumed | None,
    run: ResolvedRun,
    data: Datasets,
    model: NVAE,
    engine_name: EngineName,
    device: torch.device,
    rank: int,
) -> None:
    profile = run.profile

    def first_images() -> Tensor:
        config = profile.training
        batches = Batches(data.train, profile.model, profile.data, config.total_batch, config.seed)
        return batches.batch(0, slice(0, profile.plan.micro_batch))

    training = build_training(run, model, device, engine_factory(engine_name), None if resumed else first_images)
    first_step = 0
    if resumed is not None:
        first_step = resumed.step
        training.engine.load_state(resumed.training)
        if training.ema is not None:
            training.ema.module.load_state_dict(resumed.weights)
    if rank == 0:
        if resumed is None:
            profiles.save(profile, run_dir / "config.toml", header=f"nvae-lowmem run {run_dir.name}")
        if other_data := record_or_compare(run_dir, data.fingerprint):
            print(other_data, flush=True)
        began = f"resuming {run_dir} after step {first_step}" if first_step else f"run folder {run_dir}"
        print(f"{began}\nwatch it with: tensorboard --logdir {run_dir}", flush=True)
    Trainer(training, data, run_dir, training_pictures(profile), first_step).train()


def changed_keys(before: Profile, now: Profile) -> list[str]:
    """The keys in which two profiles differ that a run may not change half-way, with both values."""
    old, new = profiles.to_dict(before), profiles.to_dict(now)
    out = []
    for section in sorted(old.keys() - _FREE_TO_CHANGE):
        free = _FREE_TRAINING if section == "training" else set()
        for key in sorted(old[section].keys() - free):
            if old[section][key] != new[section][key]:
                out.append(f"{section}.{key} ({old[section][key]!r} -> {new[section][key]!r})")
    return out


# --- words ------------------------------------------------------------------------------------------------------------


def _silent(*_: object) -> None:
    """What ranks above 0 have to say."""


def _policies(plan: MemoryPlan) -> str:
    where = "host" if plan.offload_optimizer else "device"
    special = f", {len(plan.keep_blocks)} exceptions" if plan.keep_blocks else ""
    return f"blocks keep: {plan.keep}{special}; optimiser states on the {where}"


def _summary(run: ResolvedRun, model: NVAE) -> str:
    config = run.profile.model
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"{run.profile.name}: {parameters:,} parameters, groups per scale {list(config.scale_groups)} (highest "
        f"resolution first), {config.latent_dims:,} latent dimensions, {model.likelihood.describe()}",
        *run.reasons,
    ]
    return "\n".join(lines)
