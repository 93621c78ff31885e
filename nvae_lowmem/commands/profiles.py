"""List the shipped profiles: what each trains, on which card, and on which data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from nvae_lowmem.commands.command_line import run_command
from nvae_lowmem.config.profile_file import load, shipped_profiles
from nvae_lowmem.config.recipes import WHERE_FROM
from nvae_lowmem.config.sections import EMBEDDED_SETS, Profile
from nvae_lowmem.errors import ConfigError, command_line
from nvae_lowmem.text_table import text_table
from nvae_lowmem.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class ProfilesCommand:
    """List the shipped profiles, all of them or those that have a word in their name, and where their data come from.

    Examples:
      nvae-lowmem profiles
      nvae-lowmem profiles gtx-970
      nvae-lowmem profiles celeba64
    """

    word: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORD")] = ""
    """What to look for in names; nothing: all profiles."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the profiles; returns the exit code."""
    return run_command(ProfilesCommand, _profiles, argv)


def _profiles(command: ProfilesCommand) -> None:
    names = [name for name in shipped_profiles() if command.word.lower() in name]
    if not names:
        raise ConfigError(f"no shipped profile has {command.word!r} in its name; without a word all of them are listed")
    found = [load(name) for name in names]
    rows = [("profile", "images", "groups", "batch", "cap", "data"), *map(_row, found)]
    print("\n".join(text_table("<>>>><", rows)))
    sources = {profile.data.source for profile in found}
    missing = [f"  {name}: {WHERE_FROM[name]}" for name in sorted(sources & WHERE_FROM.keys())]
    if missing:
        print("\n".join(["", "data that you bring, with --data:", *missing]))
    print(f"\ntrain one with: {command_line('train')} --profile {names[0]}")


def _row(profile: Profile) -> tuple[str, ...]:
    model, plan = profile.model, profile.plan
    batch = str(profile.training.total_batch)
    if plan.micro_batch and plan.micro_batch < profile.training.total_batch:
        batch = f"{profile.training.total_batch // plan.micro_batch} x {plan.micro_batch}"
    own = profile.data.source in EMBEDDED_SETS
    return (
        profile.name,
        f"{model.image_size} x {model.image_size} x {model.image_channels}",
        str(model.total_groups),
        batch,
        format_bytes(plan.cap_bytes) if plan.cap_bytes else "none",
        profile.data.source if own else f"{profile.data.source} (--data)",
    )
