"""nvae-lowmem: deep hierarchical VAEs (NVAE) trained on small GPUs.

    import nvae_lowmem as nl
    model = nl.load("runs/latest")
    images = model.sample(16, temperature=0.8, seed=1)

The stable names are those of `PUBLIC`; each is imported when it is first asked for, because torch takes seconds. All
else may move between versions. docs/library.md shows them at work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; a test holds that these are the names of PUBLIC
    from nvae_lowmem.errors import ConfigError as ConfigError
    from nvae_lowmem.library.model import Latents as Latents
    from nvae_lowmem.library.model import Model as Model
    from nvae_lowmem.library.model import load as load
    from nvae_lowmem.library.training import plan as plan
    from nvae_lowmem.library.training import predict as predict
    from nvae_lowmem.library.training import train as train

__version__ = "0.1.0"

PUBLIC = {
    "ConfigError": "nvae_lowmem.errors",
    "Latents": "nvae_lowmem.library.model",
    "Model": "nvae_lowmem.library.model",
    "load": "nvae_lowmem.library.model",
    "plan": "nvae_lowmem.library.training",
    "predict": "nvae_lowmem.library.training",
    "train": "nvae_lowmem.library.training",
}
"""The stable names, and the modules that they come from; `nvae_lowmem.memory` has a few more."""


def __getattr__(name: str) -> Any:
    if name == "memory":
        return importlib.import_module(f"{__name__}.{name}")
    if name not in PUBLIC:
        raise AttributeError(f"module 'nvae_lowmem' has no attribute {name!r}; its names are {', '.join(PUBLIC)}")
    value = globals()[name] = getattr(importlib.import_module(PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
