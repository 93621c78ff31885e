"""Flags that several commands share, and what they say before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nvae_lowmem.config.choices import DeviceChoice, Posterior
from nvae_lowmem.config.profile_file import load, override
from nvae_lowmem.config.recipes import recipe
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.card import OsName
from nvae_lowmem.training.runs import find_run

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag that is given or not, without a --no- beside it."""
Overrides = Annotated[
    tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")
]
"""`--set a=1 b=2 --set c=3`."""
PictureScale = Annotated[int, tyro.conf.arg(metavar="N")]
"""`--scale N`: pixels of a picture per pixel of an image and side; 0: as many as make cells of at least 56."""
MAX_SCALE = 64
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def overridden(
    profile: Profile, given: tuple[tuple[str, ...], ...], values: Mapping[str, Any] | None = None
) -> Profile:
    """The profile with `values` by section.key, then those of all --set, checked as a whole.

    Raises ConfigError with every problem.
    """
    return override(profile, [one for several in given for one in several], values)


def at_least(lowest: int, **values: float | None) -> None:
    """Raise ConfigError for the first flag below `lowest`; None: not given. micro_batch=0 is --micro-batch 0."""
    for name, value in values.items():
        if value is not None and value < lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The flags of every command that works with a trained run."""

    run: str = "latest"
    """Run folder by path, number or name; latest: the newest one in --runs-dir."""
    runs_dir: str = "runs"
    """Where the numbered run folders are."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the run's images are now, if they have moved; in any form that training takes."""
    micro_batch: int = 0
    """Images per forward pass; 0: as many as the run's memory plan has room for."""
    device: DeviceChoice = "auto"
    """auto: the GPU where there is one."""

    def find(self) -> Path:
        """The run's folder. Raises ConfigError where there is none, and for a --micro-batch below 0."""
        at_least(0, micro_batch=self.micro_batch)
        return find_run(self.run, self.runs_dir)


@dataclass(frozen=True, kw_only=True)
class ImageFlags(RunFlags):
    """The flags of every command that sends images through a model and draws pictures."""

    box: Repeated = ()
    """x,y,w,h in pixels of the square to take from the images; once for all of them, or repeated for each."""
    posterior: Posterior = "sample"
    """z of an image: a draw from q(z|x), as in training, or each group's mean: smoother, and without a likelihood."""
    seed: int = 0
    """Seed of all draws."""
    scale: PictureScale = 0
    """How many times as large as in their files images are shown in pictures; 0: at least 56 pixels wide."""
    out: str = ""
    """Folder to write to; empty: samples/ in the run's folder."""

    def find(self) -> Path:
        """The run's folder. Raises ConfigError as for every run, and for a --scale that no picture has."""
        check_scale(self.scale)
        return super().find()


def check_scale(scale: int) -> None:
    """Raise ConfigError for a --scale below 0 or above 64."""
    if not 0 <= scale <= MAX_SCALE:
        raise ConfigError(f"--scale {scale}: must be from 1 to {MAX_SCALE}, or 0 for one that makes images visible")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags of every command that works with a model that need not be trained."""

    recipe: str = ""
    """A published recipe: mnist, cifar10, celeba64, imagenet32, celebahq256, ffhq256; or tiny, for a try."""
    profile: str = ""
    """A profile's TOML file, or the name of a shipped one (the command profiles lists them)."""
    set: Overrides = ()
    """Other values for keys of the profile, such as model.flows=0 (the command settings lists them)."""

    def base(self) -> Profile:
        """The named recipe or profile as it is. Raises ConfigError unless exactly one is named."""
        if bool(self.recipe) == bool(self.profile):
            raise ConfigError("which model? Give either --recipe NAME or --profile FILE")
        return load(self.profile) if self.profile else recipe(self.recipe)


@dataclass(frozen=True, kw_only=True)
class CardFlags:
    """The flags that say which card to plan for."""

    card: str = ""
    """gtx-970, ...; auto: the one in this machine; or a TOML file that describes it."""
    gpu_mem: str = ""
    """A card of this size, such as 4G; with --card: use no more of it than this."""
    os: OsName | None = None
    """linux (headless), desktop (Linux with a screen), windows; not given: this machine's."""


def with_micro_batch(profile: Profile, micro_batch: int | None) -> Profile:
    """The profile with so many images per forward pass; None: its own. Raises ConfigError below 1."""
    at_least(1, micro_batch=micro_batch)
    return profile if micro_batch is None else profile.with_plan(micro_batch=micro_batch)
