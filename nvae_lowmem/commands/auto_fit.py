"""`train --auto-fit`: the plan that the command fit-memory would write, found before training."""

from __future__ import annotations

import sys

import psutil
import torch

from nvae_lowmem.config.sections import EngineName, Profile
from nvae_lowmem.errors import ConfigError, NothingFits, command_line
from nvae_lowmem.hardware.budget import Budget, chosen_card, this_os, usable_bytes
from nvae_lowmem.hardware.card import Card, OsName
from nvae_lowmem.hardware.find_card import detect_card
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.explain import planned, reasons, refusals
from nvae_lowmem.memory.plan.fit import fit
from nvae_lowmem.memory.predict.predict import predictor_for
from nvae_lowmem.progress import say
from nvae_lowmem.training.engines import distributed

HOST_SHARE = 0.8
"""Of the free host memory, for plans; the rest is for data and for what else runs."""


def auto_fitted(profile: Profile, gpu_mem: str, device: torch.device) -> Profile:
    """The profile under the best plan for a card of size `gpu_mem`, such as 4G; "": the GPU of this machine.

    The total batch stays; the micro-batch is chosen. On the CPU the profile's own precision stays, too, since half
    types gain nothing there. Raises ConfigError for a size that no card has, for several processes, and where neither a
    size nor a GPU is given; NothingFits.
    """
    if distributed.launched_processes() > 1:
        raise ConfigError(
            f"--auto-fit plans for one process: fit first, {command_line('fit-memory')} --profile ... --out "
            "FITTED.toml, then start all processes with --profile FITTED.toml"
        )
    if device.type != "cuda" and not gpu_mem:
        raise ConfigError(
            "--auto-fit fits the training to the GPU of this machine, and torch sees none: leave it out, or name the "
            "card to plan for, --gpu-mem 4G"
        )
    if device.type != "cuda":
        print(
            f"warning: torch sees no GPU here: this plans for a card of {gpu_mem} and then trains on the CPU, which "
            f"takes many times longer; {command_line('fit-memory')} only plans",
            file=sys.stderr,
            flush=True,
        )
    by_launcher = distributed.launched() and profile.plan.engine == "auto"
    engine: EngineName = "deepspeed" if by_launcher else profile.plan.engine
    out = _fitted(profile, gpu_mem, engine)
    return out if device.type == "cuda" else out.with_plan(precision=profile.plan.precision)


def _of_size(gpu_mem: str, on: OsName) -> tuple[Card, Budget]:
    chosen = chosen_card(None, gpu_mem, on)
    assert chosen is not None  # a size is given
    return chosen


def card_here(on: OsName) -> tuple[Card, Budget]:
    """This machine's GPU, and what other programs leave of it now. Raises ConfigError where it is nothing."""
    card = detect_card()
    budget = usable_bytes(card, on)
    free, total = torch.cuda.mem_get_info(0)
    outside = total - free - torch.cuda.memory_reserved(0)
    return card, usable_bytes(card, on, overhead_bytes=outside) if outside > budget.context_bytes else budget


def _fitted(profile: Profile, gpu_mem: str, engine: EngineName) -> Profile:
    on = this_os()
    card, budget = _of_size(gpu_mem, on) if gpu_mem else card_here(on)
    wishes = Wishes(host_mem_bytes=int(HOST_SHARE * psutil.virtual_memory().available), engine=engine)
    found = fit(profile, card, budget, wishes, predictor_for(card, budget), say=say)
    if found.prediction is None:
        raise NothingFits("\n  ".join([f"--auto-fit: nothing fits {card.name}", *reasons(found)[:1], *refusals(found)]))
    print("\n  ".join([f"fitted to {card.name}:", *reasons(found)]), flush=True)
    command = f"launch/train.py --auto-fit --gpu-mem {gpu_mem}" if gpu_mem else "launch/train.py --auto-fit"
    return planned(found, on, command)
