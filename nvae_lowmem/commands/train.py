"""`launch/train.py`: from the command line to a finished run. Every problem is found before anything is written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import EngineName, MemoryPlan, Precision, Profile
from nvae_lowmem.data.fingerprint import record_or_compare
from nvae_lowmem.data.pipeline import Batches
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.errors import ConfigError, NothingFits
from nvae_lowmem.generation.grids import training_pictures
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.model.keep import check_block_names
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.batch_split import split_batch
from nvae_lowmem.training.build import build_model, build_training, engine_factory
from nvae_lowmem.training.checkpoint_files import NotFinite
from nvae_lowmem.training.divergence import Diverged
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.open_run import EXIT_BAD_INPUT, EXIT_OUT_OF_MEMORY, DeviceChoice, choose_device
from nvae_lowmem.training.out_of_memory import OutOfMemory, is_out_of_memory, report
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run
from nvae_lowmem.training.trainer import Pictures, Trainer

EXIT_NOTHING_FITS, EXIT_DIVERGED = 3, 4
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


Fitter = Callable[[Profile, str, EngineName], Profile]
"""(profile, size of the card as in --gpu-mem or "" for the one in this machine, engine) -> the fitted profile."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train an NVAE on your images.

    Examples:
      python launch/train.py --profile demo-mnist
      deepspeed launch/train.py --profile profiles/demo-mnist.toml
      python launch/train.py --profile demo-mnist --data ~/pictures --set model.bits=8 --set model.image_channels=3
    """

    profile: str
    """TOML file, or the name of a shipped profile (profiles/)."""
    data: str | None = None
    """Images to train on instead: a folder, a ZIP, an LMDB, MNIST or CIFAR-10 files, mnist5k, faces."""
    runs_dir: str = "runs"
    """Where the numbered run folder is made."""
    run_dir: str = ""
    """Use exactly this run folder; if it holds a checkpoint, training goes on from there."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of --run-dir; never: refuse a folder that has one."""
    total_batch: int = 0
    """Images per optimiser step over everything; 0: the profile's."""
    micro_batch: int = 0
    """Images per forward pass; 0: the profile's, or the whole share of a process."""
    steps: int = 0
    """Optimiser steps; 0: the profile's."""
    precision: Precision | None = None
    """Dtype of activations instead of the profile's."""
    engine: EngineName | None = None
    """torch, deepspeed or auto, instead of the profile's."""
    device: DeviceChoice = "auto"
    """auto: the GPU where there is one."""
    auto_fit: bool = False
    """First find the memory plan that fits the GPU, as tools/fit_memory.py does (up to a minute), then train."""
    gpu_mem: str = ""
    """With --auto-fit: plan for a card of this size, such as 4G, instead of the whole GPU of this machine."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Any other key of the profile: --set training.learning_rate=1e-3 (may be repeated)."""
    dry_run: bool = False
    """Print the configuration, the model's size and the plan, and train nothing."""
    local_rank: Annotated[int, tyro.conf.arg(name="local_rank", help="Set by the deepspeed launcher.")] = -1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and return the exit code: 0 done, 2 bad input, 3 nothing fits, 4 diverged, 5 out of memory."""
    from nvae_lowmem.commands.auto_fit import auto_fitted

    return run_training(sys.argv[1:] if argv is None else argv, training_pictures, auto_fitted)


def run_training(argv: Sequence[str], pictures_for: Callable[[Profile], Pictures], fitted: Fitter) -> int:
    """Parse argv, train, and return the exit code: 0 done, 2 bad input, 3 nothing fits, 4 diverged, 5 out of memory.

    fitted: makes the profile whose plan fits the card, for --auto-fit.
    """
    command = tyro.cli(TrainCommand, args=list(argv), prog="train.py")
    try:
        return _train(command, pictures_for, fitted)
    except NothingFits as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_NOTHING_FITS
    except ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:  # a full disk, a folder that went away
        print(f"train.py: {error}; the checkpoints that there are are untouched", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (Diverged, NotFinite) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except OutOfMemory as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY


def profile_of(command: TrainCommand) -> Profile:
    """The profile with the command line's overrides. Raises ConfigError with every problem."""
    profile = profiles.load(command.profile)
    shortcuts = {
        "data.source": command.data,
        "training.total_batch": command.total_batch or None,
        "plan.micro_batch": command.micro_batch or None,
        "training.steps": command.steps or None,
        "plan.precision": command.precision,
        "plan.engine": command.engine,
    }
    given = {key: value for key, value in shortcuts.items() if value is not None}
    changed = profiles.override(profile, command.set, given) if given or command.set else profile
    return changed.with_absolute_paths()


def _train(command: TrainCommand, pictures_for: Callable[[Profile], Pictures], fitted: Fitter) -> int:
    profile = profile_of(command)
    device = choose_device(command.device)
    if command.auto_fit:
        profile = _auto_fitted(command, profile, device, fitted)
    elif command.gpu_mem:
        raise ConfigError(f"--gpu-mem {command.gpu_mem} only means something together with --auto-fit")
    cuda_memory.prepare_environment(profile.plan)
    if device.type == "cpu":
        keep_freed_memory()
    split_batch(profile, distributed.launched_processes())
    data = open_source(profile.data, profile.model, log=print if distributed.launched_rank() == 0 else _silent)
    engine_name, why_engine = distributed.choose_engine(profile.plan, distributed.launched(), device)
    rank, world_size = 0, 1
    if engine_name == "deepspeed" and not command.dry_run:
        local_rank = command.local_rank if command.local_rank >= 0 else None
        rank, world_size, device = distributed.initialise(device, local_rank)
    run = resolve_run(profile, len(data.train), device, world_size)
    reasons = (
        data.description,
        why_engine,
        *run.reasons,
        cuda_memory.apply_memory_cap(profile.plan, device),
        _policies(profile.plan),
    )
    run = replace(run, reasons=tuple(reason for reason in reasons if reason))
    with torch.device("meta") if command.dry_run else contextlib.nullcontext():  # a dry run allocates nothing
        model = build_model(profile)
    check_block_names(model, profile.plan)
    if rank == 0:
        print(_summary(run, model), flush=True)
    if command.dry_run:
        print(profiles.dumps(run.profile))
        return 0
    try:
        return _train_on(command, run, data, model, engine_name, device, rank, pictures_for)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(report(error, run.profile, model.blocks, device)) from None
    finally:
        distributed.shutdown()


def _train_on(
    command: TrainCommand,
    run: ResolvedRun,
    data: Datasets,
    model: NVAE,
    engine_name: EngineName,
    device: torch.device,
    rank: int,
    pictures_for: Callable[[Profile], Pictures],
) -> int:
    profile = run.profile
    run_dir = Path(distributed.broadcast_object(str(_run_dir(command, profile)) if rank == 0 else ""))
    with runs.locked(run_dir) if rank == 0 else contextlib.nullcontext():
        resumed = _resumed(run_dir, model, rank)
        return _train_in(run_dir, resumed, run, data, model, engine_name, device, rank, pictures_for)


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
    pictures_for: Callable[[Profile], Pictures],
) -> int:
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
    Trainer(training, data, run_dir, pictures_for(profile), first_step).train()
    if rank == 0:
        print(f"pictures: {run_dir / 'samples'}\nsample more with: python launch/sample.py --run {run_dir}", flush=True)
    return 0


def _auto_fitted(command: TrainCommand, profile: Profile, device: torch.device, fitted: Fitter) -> Profile:
    """The profile under the plan that fits; on the CPU with the profile's own precision, whose speed is another."""
    if distributed.launched_processes() > 1:
        raise ConfigError(
            "--auto-fit plans for one process: fit first, python tools/fit_memory.py --profile ... --out FITTED.toml, "
            "then start all processes with --profile FITTED.toml"
        )
    if device.type != "cuda" and not command.gpu_mem:
        raise ConfigError(
            "--auto-fit fits the training to the GPU of this machine, and torch sees none: leave it out, or name the "
            "card to plan for, --gpu-mem 4G"
        )
    engine: EngineName = (
        "deepspeed" if distributed.launched() and profile.plan.engine == "auto" else profile.plan.engine
    )
    out = fitted(profile, command.gpu_mem, engine)
    return out if device.type == "cuda" else out.with_plan(precision=profile.plan.precision)


def _run_dir(command: TrainCommand, profile: Profile) -> Path:
    """The folder to write to: a new numbered one, or --run-dir, whose configuration must then be the same."""
    if not command.run_dir:
        return runs.new_run(command.runs_dir, profile.name)
    folder = Path(command.run_dir)
    if checkpoint.newest(folder) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--run-dir {folder}: cannot be made: {error.strerror or error}") from None
        return folder
    if command.resume == "never":
        raise ConfigError(f"--run-dir {folder} holds a checkpoint and --resume is never: name another folder")
    changed = changed_keys(profiles.load(folder / "config.toml").with_absolute_paths(), profile)
    if changed:
        raise ConfigError(
            f"--run-dir {folder} was trained with another configuration; these differ: {', '.join(changed)}. "
            "Set them back, or name another folder"
        )
    return folder


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
