"""Train an NVAE on your images."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.commands.flags import Overrides, Switch, at_least, overridden
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.choices import DeviceChoice
from nvae_lowmem.config.sections import DataConfig, EngineName, Precision, Profile
from nvae_lowmem.errors import ConfigError, ExitCode
from nvae_lowmem.hardware.budget import parse_gpu_mem

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train an NVAE on your images.

    Exit status: 0 done; 2 bad input, or nothing can be written; 3 with --auto-fit: nothing fits; 4 training blew up;
    5 out of memory; 6 another process of the run died; 129, 130, 143 stopped by a signal, with a checkpoint.

    Without --profile, images and hours choose everything: nvae-lowmem train --data FOLDER.

    Examples:
      nvae-lowmem train --data ~/pictures --size 64 --hours 8
      nvae-lowmem train --data mnist5k --minutes 8
      nvae-lowmem train --profile demo-mnist
      nvae-lowmem train --profile demo-faces --data ~/pictures
      nvae-lowmem train --profile demo-mnist --minutes 8
      nvae-lowmem train --profile gtx-970-celeba64 --data celeba.zip --steps 5
      nvae-lowmem train --profile demo-mnist --labels
      nvae-lowmem train --init-from runs/00003-demo-faces --data ~/pictures --steps 2000
      nvae-lowmem train --run-dir runs/00003-demo-mnist
      nvae-lowmem train --run-dir runs/00003-demo-mnist --set training.learning_rate=1e-3
      deepspeed launch/train.py --profile profiles/demo-mnist.toml
    """

    profile: str = ""
    """TOML file, or the name of a shipped profile (profiles/); empty: the configuration of the run in --run-dir, or
    with --data chosen for these images, this machine and --hours."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Images to train on instead: a folder, a ZIP, an LMDB, MNIST or CIFAR-10 files, mnist5k, faces."""
    size: int = 0
    """Without --profile: pixels per side to train at; 0: the images' own where they are small, else 64."""
    card: str = ""
    """Without --profile, with --dry-run or on a GPU: plan for this card (gtx-970, ...) instead of this machine's."""
    init_from: str = ""
    """Start from trained weights: a run, one of its checkpoints, an export, or a published checkpoint.pt. Without
    --profile everything else is as they were trained, but for a lower learning rate."""
    freeze: tuple[str, ...] = ()
    """Blocks that are not trained, by name or prefix*: --freeze stem 'pre_*' 'enc_*' top is the encoder."""
    labels: Switch = False
    """Train with the images' class labels, so that a class can be asked for when sampling: sets model.classes."""
    runs_dir: str = "runs"
    """Where the numbered run folder is made."""
    name: str = ""
    """Name of the run, which ends its numbered folder's name, instead of the profile's."""
    run_dir: str = ""
    """Use exactly this run folder; if it holds a checkpoint, training goes on from there."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of --run-dir; never: refuse a folder that has one."""
    resume_from: int | None = None
    """Go on from the checkpoint of this step of --run-dir; later ones are set aside."""
    no_rewind: bool = False
    """End with exit code 4 when training blows up, instead of going back with half the learning rate."""
    total_batch: int = 0
    """Images per optimiser step over everything; 0: the profile's."""
    micro_batch: int = 0
    """Images per forward pass; 0: the profile's, or the whole share of a process."""
    steps: int = 0
    """Optimiser steps; 0: the profile's."""
    hours: float | None = None
    """Hours that training may take, over all interruptions; it chooses the number of steps. 0: no limit, and without
    --profile overnight: 8."""
    minutes: float | None = None
    """The same in minutes."""
    precision: Precision | None = None
    """Dtype of activations instead of the profile's."""
    engine: EngineName | None = None
    """torch, deepspeed or auto, instead of the profile's."""
    device: DeviceChoice = "auto"
    """auto: the GPU where there is one."""
    auto_fit: bool = False
    """First find the memory plan that fits the GPU, as tools/fit_memory.py does (up to a minute), then train."""
    gpu_mem: str = ""
    """With --auto-fit, or without --profile: plan for a card of this size, such as 4G, instead of the whole GPU."""
    set: Overrides = ()
    """Any other key of the profile: --set training.learning_rate=1e-3 (the command settings lists them)."""
    dry_run: bool = False
    """Print the configuration, the model's size and the plan, and train nothing."""
    local_rank: Annotated[int, tyro.conf.arg(name="local_rank", help="Set by the deepspeed launcher.")] = -1

    def asked(self) -> Profile:
        """The profile with the command line's overrides. Raises ConfigError with every problem."""
        return self.changed(self._base())

    def chooses(self) -> bool:
        """Whether images and hours are to choose the profile."""
        return (
            bool(self.data) and not self.profile and not self.init_from and not (self.run_dir and self._own().is_file())
        )

    def changed(self, profile: Profile) -> Profile:
        """The profile with the command line's overrides. Raises ConfigError with every problem."""
        if self.name:
            profile = profiles.from_dict(profiles.to_dict(profile) | {"name": self.name}, "--name")
        shortcuts = {
            "data.source": self.data,
            "training.freeze": self.freeze or None,
            "training.total_batch": self.total_batch or None,
            "plan.micro_batch": self.micro_batch or None,
            "training.steps": self.steps or None,
            "training.hours": self.asked_hours(),
            "plan.precision": self.precision,
            "plan.engine": self.engine,
        }
        given = {key: value for key, value in shortcuts.items() if value is not None}
        return overridden(profile, self.set, given).with_absolute_paths()

    def asked_hours(self) -> float | None:
        """What --hours or --minutes says, no limit with --steps; None: nothing said. Raises ConfigError for several."""
        given = [name for name in ("hours", "minutes", "steps") if getattr(self, name)]
        if len(given) > 1:
            flags = " and ".join(f"--{name} {getattr(self, name):g}" for name in given)
            raise ConfigError(f"{flags} each say how long training goes on: give one of them")
        if self.steps:
            return 0.0
        return self.minutes / 60 if self.minutes is not None else self.hours

    def _base(self) -> Profile:
        """The profile before any override."""
        if self.init_from:
            from nvae_lowmem.commands.fine_tuning import starting_profile

            return starting_profile(self.init_from, self.runs_dir, self.profile, self.run_dir)
        if self.profile:
            return profiles.load(self.profile)
        if self.run_dir and self._own().is_file():
            return profiles.load(self._own())
        raise ConfigError(
            "--profile is missing: name a TOML file or a shipped profile, or a --run-dir to go on with, or give --data "
            "alone, and a model is chosen for these images"
        )

    def _own(self) -> Path:
        return Path(self.run_dir) / "config.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and return the exit code."""
    return run_command(TrainCommand, _train, argv)


def _train(command: TrainCommand) -> ExitCode:
    began = time.monotonic()  # before torch is imported: whoever gives hours pays for that, too
    at_least(
        0,
        total_batch=command.total_batch,
        micro_batch=command.micro_batch,
        steps=command.steps,
        hours=command.hours,
        minutes=command.minutes,
        size=command.size,
    )
    if command.gpu_mem:
        parse_gpu_mem(command.gpu_mem)
    if command.resume_from is not None and not command.run_dir:
        raise ConfigError(f"--resume-from {command.resume_from} needs --run-dir: name the run that has this checkpoint")
    if command.labels:
        command = _with_classes(command)
    profile, sheet = _chosen(command) if command.chooses() else (_given(command), None)
    from nvae_lowmem.commands.training_run import RunFolder, train

    return train(
        profile,
        RunFolder(
            run_dir=command.run_dir,
            runs_dir=command.runs_dir,
            resume=command.resume,
            resume_from=command.resume_from,
            rewind=not command.no_rewind,
        ),
        device=command.device,
        auto_fit=command.auto_fit,
        gpu_mem=command.gpu_mem,
        dry_run=command.dry_run,
        local_rank=command.local_rank,
        began=began,
        sheet=sheet,
    )


def _with_classes(command: TrainCommand) -> TrainCommand:
    """The command with model.classes as the images' labels have it. Raises ConfigError where they have none."""
    from nvae_lowmem.data.sources import class_names

    profile = Profile(data=DataConfig(source=command.data or "")) if command.chooses() else command.asked()
    names = class_names(profile.data, profile.model, log=lambda _: None)
    return replace(command, set=(*command.set, (f"model.classes={len(names)}",)))


def _given(command: TrainCommand) -> Profile:
    """The named profile, or that of the run that goes on."""
    profile = command.asked()
    for flag, given in ((f"--size {command.size}", command.size), (f"--card {command.card}", command.card)):
        if given:
            raise ConfigError(
                f"{flag} only means something without --profile and without a --run-dir that goes on, where --data "
                "chooses the model: leave it out, or change the profile with --set (such as model.image_size=64)"
            )
    if command.gpu_mem and not command.auto_fit:
        raise ConfigError(f"--gpu-mem {command.gpu_mem} only means something together with --auto-fit")
    return profile


def _chosen(command: TrainCommand) -> tuple[Profile, np.ndarray]:
    """The profile that images, machine and hours choose, and a contact sheet of the images."""
    if command.auto_fit:
        raise ConfigError("--auto-fit goes with --profile: where --data chooses the model, its plan is fitted anyway")
    hours = command.asked_hours()
    from nvae_lowmem.budget.planned import sheet
    from nvae_lowmem.commands.choice import for_this_machine, wanted
    from nvae_lowmem.memory.plan import explain

    assert command.data is not None
    planned = for_this_machine(
        wanted(command.data, command.size, hours, command.set),
        card=command.card,
        gpu_mem=command.gpu_mem,
        device=command.device,
        only_plans=command.dry_run,
        command=shlex.join(
            ["nvae-lowmem", "train", "--data", command.data, *(("--hours", f"{hours:g}") if hours else ())]
        ),
    )
    print(planned.text(), flush=True)
    if planned.fit is not None:
        print("\n  ".join(["memory", *explain.reasons(planned.fit)]), flush=True)
    # what was asked for in hours is in the profile already, or the images are used up before
    rest = replace(command, hours=None, minutes=None, set=())
    return rest.changed(planned.profile), sheet(planned.profile)
