"""A training from its profile to a finished run. Every problem is found before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nvae_lowmem.commands.auto_fit import auto_fitted
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.choices import DeviceChoice
from nvae_lowmem.config.paths import storable
from nvae_lowmem.config.sections import EngineName, MemoryPlan, Profile
from nvae_lowmem.data.dataset import Dataset
from nvae_lowmem.data.look import PHOTOGRAPH_SHARE, middle_share
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.errors import ConfigError, ExitCode, LostProcess, command_line, printable
from nvae_lowmem.generation.grids import save_png, training_pictures
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.card import load_cards
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.hardware.find_card import device_name
from nvae_lowmem.library.weights import initial_weights
from nvae_lowmem.memory.plan.duration import expected, step_time
from nvae_lowmem.model.freeze import freeze_blocks
from nvae_lowmem.model.keep import check_block_names
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint, runs
from nvae_lowmem.training.batch_split import split_batch
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.initial_weights import InitialWeights
from nvae_lowmem.training.open_run import choose_device
from nvae_lowmem.training.patient_output import patient_output
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run
from nvae_lowmem.training.session import Session, check_changes
from nvae_lowmem.training.speed import Expected
from nvae_lowmem.training.stopping import exit_status

_LOOKED_AT = 16


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run is written to, as the flags of the same names say."""

    run_dir: str
    """Exactly this folder, and its run goes on; empty: a new numbered one."""
    runs_dir: str
    resume: Literal["auto", "never"]
    resume_from: int | None = None
    """Go on from the checkpoint of this step."""
    rewind: bool = True
    """Whether training may go back when it blows up."""

    def begun(self) -> bool:
        """Whether it holds a run that goes on from a checkpoint."""
        folder = Path(self.run_dir)
        return bool(self.run_dir) and folder.is_dir() and bool(checkpoint.all_checkpoints(folder))

    def made(self, run: ResolvedRun) -> Path:
        """The folder, made if need be; an earlier run in it must be one that this one can go on from.

        Raises ConfigError, and then nothing has changed in it.
        """
        for flag, name in (("--run-dir", self.run_dir), ("--runs-dir", self.runs_dir)):
            if storable(name) != name:
                raise ConfigError(
                    f"{flag} {printable(name)}: the name is no UTF-8, which TensorBoard needs: name another"
                )
        if not self.run_dir:
            return runs.new_run(self.runs_dir, run.profile.name)
        folder = Path(self.run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--run-dir {folder}: cannot be made: {error.strerror or error}") from None
        if self.begun() and self.resume == "never":
            raise ConfigError(f"--run-dir {folder} holds a checkpoint and --resume is never: name another folder")
        check_changes(folder, run)
        return folder


def train(
    profile: Profile,
    folder: RunFolder,
    *,
    device: DeviceChoice = "auto",
    auto_fit: bool = False,
    gpu_mem: str = "",
    dry_run: bool = False,
    local_rank: int = -1,
    began: float | None = None,
    sheet: np.ndarray | None = None,
) -> ExitCode:
    """Train, or with dry_run only print what would be trained; DONE, or the signal that training was stopped by.

    began: when the time of a training that has hours began to run, by time.monotonic; None: as it begins.
    sheet: a picture of the images (H, W, 3), for the run's folder.
    Raises ConfigError, NothingFits, Diverged, OutOfMemory, LostProcess; what was not begun leaves no folder behind.
    """
    with patient_output():
        return _train(profile, folder, device, auto_fit, gpu_mem, dry_run, local_rank, began, sheet)


def _train(
    profile: Profile,
    folder: RunFolder,
    device: DeviceChoice,
    auto_fit: bool,
    gpu_mem: str,
    dry_run: bool,
    local_rank: int,
    began: float | None,
    sheet: np.ndarray | None,
) -> ExitCode:
    where = choose_device(device)
    if auto_fit:
        profile = auto_fitted(profile, gpu_mem, where)
    cuda_memory.prepare_environment(profile.plan)
    if where.type == "cpu":
        keep_freed_memory()
    split_batch(profile, distributed.launched_processes())
    data = open_source(profile.data, profile.model, log=print if distributed.launched_rank() == 0 else _silent)
    profile = data.named_in(profile)
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
    with torch.device("meta"):  # for its size and its blocks; the session makes the one that is trained
        model = NVAE(profile.model)
    check_block_names(model, profile.plan)
    reasons = (*reasons, freeze_blocks(model, profile.training.freeze))
    initial, taken = initial_weights(profile, folder.runs_dir, folder.begun())
    reasons = (*reasons, taken if dry_run else "")  # else the session says it, into the log, too
    run = replace(run, reasons=tuple(reason for reason in reasons if reason))
    if rank == 0:
        print(_summary(run, model), flush=True)
        if warning := warning_of_bits(profile, data.train):
            print(warning, file=sys.stderr, flush=True)
    if dry_run:
        print(profiles.dumps(run.profile))
        return ExitCode.DONE
    try:
        code = _train_on(folder, run, data, engine_name, where, rank, began, sheet, initial)
        distributed.barrier()  # nobody closes the groups while another still uses them
        return code
    except RuntimeError as error:
        if not distributed.is_lost_process(error):
            raise
        raise LostProcess(
            f"process {rank} lost another process of this run, so all of them end; the last checkpoint is whole, and "
            "the same command with --run-dir goes on from it"
        ) from None
    finally:
        distributed.shutdown()


def _train_on(
    where: RunFolder,
    run: ResolvedRun,
    data: Datasets,
    engine: EngineName,
    device: torch.device,
    rank: int,
    began: float | None,
    sheet: np.ndarray | None,
    initial: Callable[[], InitialWeights] | None,
) -> ExitCode:
    run_dir = Path(distributed.from_first(lambda: str(where.made(run))))
    if rank == 0:
        print(f"run folder {run_dir}\nwatch it with: tensorboard --logdir {run_dir}", flush=True)
        if sheet is not None:
            print(f"the images as training sees them: {save_png(sheet, run_dir / 'images.png')}", flush=True)
    session = Session(
        run=run,
        data=data,
        engine=engine,
        device=device,
        rank=rank,
        run_dir=run_dir,
        pictures=training_pictures(run.profile),
        resume_from=where.resume_from,
        most_rewinds=run.profile.training.rewinds if where.rewind else 0,
        began=began,
        expected=expected_speed(run.profile, device),
        initial=initial,
    )
    try:
        stopped_by = session.train()
    except BaseException:
        if rank == 0 and not where.run_dir:
            runs.remove_unused(run_dir)
        raise
    if stopped_by:
        return ExitCode(exit_status(stopped_by))
    if rank == 0:
        samples = f"sample more with: {command_line('sample')} --run {run_dir}"
        print(f"pictures: {run_dir / 'samples'}\n{samples}", flush=True)
    return ExitCode.DONE


def expected_speed(profile: Profile, device: torch.device) -> Expected | None:
    """Seconds per step as the profile's provenance has them, and whether they are for this device; None: none there."""
    time = step_time(profile)
    if time is None:
        return None
    here, name = device_name(device), time.measured_on
    if not name:
        card = load_cards().get(str(profile.provenance.get("card", "")))
        name = card.name if card is not None else str(profile.provenance.get("card", "another card"))
    is_here = name.removeprefix("NVIDIA ") == here.removeprefix("NVIDIA ")  # old drivers leave the maker out
    return Expected(
        least_seconds=time.least_seconds,
        most_seconds=time.most_seconds,
        device=name,
        measured=bool(time.measured_on),
        is_here=is_here,
    )


# --- words ------------------------------------------------------------------------------------------------------------


def warning_of_bits(profile: Profile, images: Dataset) -> str:
    """Why these images should not be trained on with one bit: they are photographs; "" where they are drawings."""
    if profile.model.bits > 1:
        return ""
    share = middle_share(images.images(range(min(_LOOKED_AT, len(images)))).numpy())
    if share < PHOTOGRAPH_SHARE:
        return ""
    return (
        f"warning: {share:.0%} of the pixels are neither dark nor light, as in photographs, and model.bits = 1 makes "
        "each of them black or white at random: use --set model.bits=8, or a profile for photographs (demo-faces)"
    )


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
