"""Master weights, gradients and Adamax states in host memory, for the torch engine: 16 bytes per parameter there.

A gradient leaves the device in the hook that runs as soon as autograd has accumulated it, so that no more than one
layer's gradients ever lie there. Where nothing has to be known about all gradients first (no clipping, no loss scale),
the host updates a parameter while the device still goes backward through earlier layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from nvae_lowmem.model.host import host_memory
from nvae_lowmem.training.engines.host_adamax import HostAdamax


class HostMasters:
    """Host copies of device parameters, in the same order; `tensors` is what the optimiser works on."""

    def __init__(self, parameters: Sequence[Tensor], pin_memory: bool) -> None:
        pin = pin_memory and parameters[0].is_cuda
        self._parameters = list(parameters)
        with host_memory():
            self.tensors = [torch.empty(p.shape, dtype=p.dtype, pin_memory=pin) for p in parameters]
            self._gradients = [torch.empty(p.shape, dtype=p.dtype, pin_memory=pin) for p in parameters]
        self.last_micro_batch = True
        self.early = False
        self._filled = [False] * len(self.tensors)
        self._pending: list[Future[None]] = []
        self._worker: ThreadPoolExecutor | None = None
        for master, p in zip(self.tensors, parameters, strict=True):
            master.copy_(p.detach())
            master.requires_grad_()

    def attach(self, optimizer: torch.optim.Adamax, early: bool) -> None:
        """Put the hooks on the parameters. early: update each one as soon as its gradient is complete."""
        self._optimizer, self.early = optimizer, early and isinstance(optimizer, HostAdamax)
        # beside a GPU the host is idle during backward; without one it would only take cores from the backward pass
        if early and self._parameters[0].is_cuda:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="host-adamax")
        for index, p in enumerate(self._parameters):
            p.register_post_accumulate_grad_hook(lambda p, index=index: self._take(index, p))

    def _take(self, index: int, parameter: Tensor) -> None:
        """The gradient of one parameter to the host, off the device."""
        assert parameter.grad is not None
        held = self._gradients[index]
        if self._filled[index]:
            held.add_(parameter.grad.to(held.device))
        else:
            held.copy_(parameter.grad)  # from the device: waits for it, so that the host may read at once
            self._filled[index] = True
        parameter.grad = None
        if self.early and self.last_micro_batch:
            self.tensors[index].grad = held
            if self._worker is not None:
                self._pending.append(self._worker.submit(self._step, index))
            else:
                self._step(index)

    def _step(self, index: int) -> None:
        assert isinstance(self._optimizer, HostAdamax)
        self._optimizer.step_parameter(self.tensors[index])

    def collect(self) -> None:
        """All gradients of this step on the masters; waits for updates under way."""
        for future in self._pending:
            future.result()
        self._pending.clear()
        for master, gradient, filled in zip(self.tensors, self._gradients, self._filled, strict=True):
            master.grad = gradient if filled else None

    @torch.no_grad()
    def publish(self) -> None:
        """The masters back into the device's parameters; the host gradients are free for the next step."""
        for parameter, master in zip(self._parameters, self.tensors, strict=True):
            parameter.copy_(master)
            master.grad = None
        self._filled = [False] * len(self.tensors)
