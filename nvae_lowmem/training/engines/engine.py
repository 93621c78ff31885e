"""What the step asks of whoever runs it: the `Engine` protocol, and what an update says of itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nvae_lowmem.model.latents import Noise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import LossTerms


class Update(NamedTuple):
    """What the optimiser did: whether it skipped the step because of an overflow, and the true gradient norm."""

    overflow: bool
    gradient_norm: Tensor | float | None  # None where nobody asked for it
    refused: bool = False  # skipped, because the norm was larger than training.skip_gradient_norm and its like allow


class Engine(Protocol):
    """Runs the objective on a device and updates its parameters; one process of `world_size`."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def model(self) -> NVAE:
        """The network itself."""
        ...

    @property
    def loss_scale(self) -> float:
        """What backward multiplies the loss by, besides 1 / accumulation."""
        ...

    def begin(self, learning_rate: float) -> None:
        """A step begins; an engine may update a parameter as soon as its gradient is complete."""
        ...

    def forward(self, x: Tensor, noise: Noise, beta: float, labels: Tensor | None = None) -> LossTerms:
        """One micro-batch through the objective; labels as `NVAE` takes them."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of loss x loss scale / accumulation, added up; `last`: of the last micro-batch of this step."""
        ...

    def update(self) -> Update:
        """Unscale, clip, one optimiser step, gradients gone."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which every parameter is whole; all processes enter it together."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything training needs to go on, on the host, the same for every engine (see checkpoint.py)."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, from any engine, stage or number of processes."""
        ...
