"""Images, a card and hours in place of a profile: what the commands train and fit-memory share."""

from __future__ import annotations

import psutil

from nvae_lowmem.budget.choose import Wanted
from nvae_lowmem.budget.planned import Planned, for_card, for_cpu
from nvae_lowmem.commands.auto_fit import HOST_SHARE, card_here
from nvae_lowmem.commands.flags import Overrides, overridden
from nvae_lowmem.config.choices import DeviceChoice
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import DataConfig, Profile
from nvae_lowmem.errors import ConfigError, command_line
from nvae_lowmem.hardware.budget import chosen_card, this_os
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.progress import say
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.open_run import choose_device

OVERNIGHT_HOURS = 8.0
"""When nobody says how long."""


def wanted(data: str, size: int, hours: float | None, settings: Overrides) -> Wanted:
    """What the flags ask for. Raises ConfigError for settings that no profile can have."""

    def change(profile: Profile) -> Profile:
        return overridden(profile, settings)

    # only these are known before there is a model; the others meet the one that is chosen
    of_data = tuple(tuple(text for text in several if text.startswith("data.")) for several in settings)
    plain = Profile(model=ModelConfig(padding=2), data=DataConfig(source=data))
    asked = overridden(plain, of_data).with_absolute_paths()
    return Wanted(data=asked.data, size=size, hours=hours or OVERNIGHT_HOURS, change=change)


def for_this_machine(
    asked: Wanted, *, card: str, gpu_mem: str, device: DeviceChoice, only_plans: bool, command: str
) -> Planned:
    """The choice for the device that is to train, or for another card where nothing is trained.

    Raises ConfigError for several processes, and for a card that is to train and is not here; NothingFits.
    """
    if distributed.launched_processes() > 1:
        raise ConfigError(
            f"without --profile one process chooses the model: choose first, {command_line('fit-memory')} --data ... "
            "--hours ... --out CHOSEN.toml, then start all processes with --profile CHOSEN.toml"
        )
    where, on = choose_device(device), this_os()
    if where.type != "cuda" and (card or gpu_mem) and not only_plans:
        raise ConfigError(
            f"{f'--card {card}' if card else f'--gpu-mem {gpu_mem}'}: torch sees no GPU here to train on: leave it out "
            "to train on the CPU, add --dry-run to see the choice, or write its profile with "
            f"{command_line('fit-memory')}"
        )
    if where.type != "cuda" and not (card or gpu_mem):
        say("timing a few steps of models of several sizes")
        return for_cpu(asked)
    chosen = chosen_card(card or None, gpu_mem or None, on)
    wishes = Wishes(host_mem_bytes=int(HOST_SHARE * psutil.virtual_memory().available)) if not only_plans else Wishes()
    return for_card(asked, *(chosen or card_here(on)), wishes, on=on, command=command, say=say)
