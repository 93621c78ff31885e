"""Where the torch engine's gradients and Adamax states lie: on the device, or in host memory.

On the host a parameter costs 16 bytes there (master weight, gradient, two states) and 4 on the device (the weight). A
gradient leaves the device in the hook that runs as soon as autograd has accumulated it, so that no more than one
layer's gradients ever lie there. Where nothing has to be known about all gradients first (no norm, no loss scale), the
host updates a parameter while the device still goes backward through earlier layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from nvae_lowmem.model.host import host_memory
from nvae_lowmem.training.engines.host_adamax import HostAdamax


class Placement(Protocol):
    """What the engine asks of it, in the order of a step: `backward_begins` per micro-batch, then the others once."""

    held: Sequence[Tensor]
    """The tensors that the optimiser updates, one per parameter, in order; their `.grad` is valid after `collect`."""

    def attach(self, optimizer: torch.optim.Adamax, eager: bool) -> None:
        """The optimiser of `held`. eager: a parameter may be updated as soon as its own gradient is complete."""
        ...

    def backward_begins(self, last: bool) -> None:
        """The backward pass of a micro-batch begins; `last`: of this step."""
        ...

    def collect(self) -> None:
        """Gradients are where the optimiser looks for them, and updates under way are done."""
        ...

    def step(self) -> None:
        """Update what has not been updated yet."""
        ...

    def release(self) -> None:
        """Updated weights are where the model uses them, and gradients are gone."""
        ...


class OnDevice:
    """Gradients and states beside the weights; the optimiser updates the model's own parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.held: Sequence[Tensor] = list(parameters)

    def attach(self, optimizer: torch.optim.Adamax, eager: bool) -> None:
        """As Placement; the device updates after backward in any case."""
        self._optimizer = optimizer

    def backward_begins(self, last: bool) -> None:
        """As Placement."""

    def collect(self) -> None:
        """As Placement."""

    def step(self) -> None:
        """As Placement."""
        self._optimizer.step()

    def release(self) -> None:
        """As Placement."""
        self._optimizer.zero_grad(set_to_none=True)


class OnHost:
    """Masters, gradients and states in host memory; the device has the weights and one layer's gradients at a time.

    pin_memory: page-locked masters and gradients, where there is a CUDA device.
    """

    def __init__(self, parameters: Sequence[Tensor], pin_memory: bool) -> None:
        pin = pin_memory and parameters[0].is_cuda
        self._parameters = list(parameters)
        with host_memory():
            self.held: Sequence[Tensor] = [torch.empty(p.shape, dtype=p.dtype, pin_memory=pin) for p in parameters]
            self._gradients = [torch.empty(p.shape, dtype=p.dtype, pin_memory=pin) for p in parameters]
        for master, p in zip(self.held, parameters, strict=True):
            master.copy_(p.detach())
            master.requires_grad_()
        self._last = True
        self._under_way: list[Future[None]] = []
        self._thread: ThreadPoolExecutor | None = None

    def attach(self, optimizer: torch.optim.Adamax, eager: bool) -> None:
        """As Placement; puts the hooks on the parameters."""
        self._optimizer, self._eager = optimizer, eager and isinstance(optimizer, HostAdamax)
        # beside a GPU the host is idle during backward; without one it would only take cores from the backward pass
        if eager and self._parameters[0].is_cuda:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="host-adamax")
        for index, p in enumerate(self._parameters):
            p.register_post_accumulate_grad_hook(lambda p, index=index: self._take(index, p))

    def backward_begins(self, last: bool) -> None:
        """As Placement."""
        self._last = last

    def _take(self, index: int, parameter: Tensor) -> None:
        """The gradient of one parameter to the host, off the device."""
        assert parameter.grad is not None
        master, gradient = self.held[index], self._gradients[index]
        if master.grad is None:  # of the first micro-batch
            gradient.copy_(parameter.grad)  # from the device: waits for it, so that the host may read at once
            master.grad = gradient
        else:
            gradient.add_(parameter.grad.to(gradient.device))
        parameter.grad = None
        if self._eager and self._last:
            if self._thread is not None:
                self._under_way.append(self._thread.submit(self._update, master))
            else:
                self._update(master)

    def _update(self, master: Tensor) -> None:
        assert isinstance(self._optimizer, HostAdamax)
        self._optimizer.step_parameter(master)

    def collect(self) -> None:
        """As Placement."""
        for future in self._under_way:
            future.result()
        self._under_way.clear()

    def step(self) -> None:
        """As Placement."""
        if not self._eager:
            self._optimizer.step()

    @torch.no_grad()
    def release(self) -> None:
        """As Placement."""
        for parameter, master in zip(self._parameters, self.held, strict=True):
            parameter.copy_(master)
            master.grad = None
