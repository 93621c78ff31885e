"""Memory of a training step: trace it, simulate the allocator, predict, plan, measure.

import nvae_lowmem as nl
print(nl.memory.predict_step(build, card="gtx-970"))     # of any PyTorch training step
"""

from __future__ import annotations

import importlib
from typing import Any

PUBLIC = {
    "StepPrediction": ("nvae_lowmem.memory.predict.any_step", "StepPrediction"),
    "on_host": ("nvae_lowmem.model.host", "host_memory"),
    "predict_step": ("nvae_lowmem.memory.predict.any_step", "predict_step"),
}
"""The stable names, and where they come from; imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(
            f"module 'nvae_lowmem.memory' has no attribute {name!r}; its names are {', '.join(PUBLIC)}"
        )
    module, attribute = PUBLIC[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value
