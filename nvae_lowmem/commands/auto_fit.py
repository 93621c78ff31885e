"""`launch/train.py --auto-fit`: the plan that tools/fit_memory.py would write, found before training."""

from __future__ import annotations

import sys

import psutil

from nvae_lowmem.config.sections import EngineName, Profile
from nvae_lowmem.errors import NothingFits
from nvae_lowmem.hardware.budget import chosen_card, this_os
from nvae_lowmem.memory.plan.candidates import Wishes
from nvae_lowmem.memory.plan.explain import planned, reasons, refusals
from nvae_lowmem.memory.plan.fit import fit
from nvae_lowmem.memory.predict.predict import predictor_for

_HOST_SHARE = 0.8  # of the free host memory; the rest is for data and for what else runs


def auto_fitted(profile: Profile, gpu_mem: str, engine: EngineName) -> Profile:
    """The profile under the best plan for a card of size `gpu_mem`, such as 4G; "": the GPU of this machine.

    The total batch stays; the micro-batch is chosen. Raises ConfigError for a size that no card has, NothingFits.
    """
    on = this_os()
    chosen = chosen_card(None if gpu_mem else "auto", gpu_mem or None, on)
    assert chosen is not None  # one of both is given
    card, budget = chosen
    wishes = Wishes(host_mem_bytes=int(_HOST_SHARE * psutil.virtual_memory().available), engine=engine)
    found = fit(profile, card, budget, wishes, predictor_for(card, budget), say=_say)
    if found.prediction is None:
        raise NothingFits("\n  ".join([f"--auto-fit: nothing fits {card.name}", *reasons(found)[:1], *refusals(found)]))
    print("\n  ".join([f"fitted to {card.name}:", *reasons(found)]), flush=True)
    return planned(
        found, on, f"launch/train.py --auto-fit --gpu-mem {gpu_mem}" if gpu_mem else "launch/train.py --auto-fit"
    )


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)
