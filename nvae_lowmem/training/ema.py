"""Exponential moving average of the weights, kept in host memory if wanted, on torch's AveragedModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nvae_lowmem.model.host import host_memory


class WeightEma:
    """Averaged copy of a model: parameters by a moving average, buffers (BatchNorm statistics) as they last were.

        average <- d * average + (1 - d) * weights,   d = min(decay, (1 + step) / (10 + step))

    The smaller d of early steps lets the average leave the random initial weights behind. Floating parameters of less
    than 32 bits are averaged in fp32: a bfloat16 average loses every update smaller than 2^-9 of the weight.

    `device="cpu"` keeps the copy in host memory; None keeps each tensor where the model's is. Nothing here allocates
    more on the model's device than one parameter at a time, beside the copy itself if it lives there.
    To be built before hooks are put on the model's modules: copying a module copies its hooks.

    Raises ValueError if `decay` is outside [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float, device: str | torch.device | None = "cpu") -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema decay {decay} must be from 0 to 1")
        self.decay = decay
        # AveragedModel deep-copies what it is given on the device where that lies: it gets an empty module, and then
        # a copy that was made on `device` to begin with.
        where = torch.device(device) if device is not None else None
        self._memory = host_memory if where is not None and where.type == "cpu" else nullcontext
        with self._memory():
            self._averaged = AveragedModel(nn.Identity(), device=where)
            self._averaged.module = _copy_of(model, device)
        self._applied = False

    @property
    def module(self) -> nn.Module:
        """The averaged model (parameters need no gradient). Not to be used inside `applied_to`."""
        return self._averaged.module

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after optimiser step `step` (from 0)."""
        self._refuse_if_applied("update")
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        # One parameter at a time, not AveragedModel.update_parameters: that brings the whole model over first.
        for averaged, live in zip(self.module.parameters(), model.parameters(), strict=True):
            if not averaged.is_floating_point():
                averaged.copy_(live)
            elif live.requires_grad:  # a frozen parameter is its own average
                average([averaged], [live.detach().to(averaged.device, averaged.dtype)], self._averaged.n_averaged)
        for held, running in zip(self.module.buffers(), model.buffers(), strict=True):
            held.copy_(running)
        self._averaged.n_averaged += 1

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the context `model` has the averaged weights and buffers; after it, also on exceptions, its own.

        Each parameter changes places with its average, in place, so neither the device nor the host holds a further
        copy of the model; `module` holds the training weights meanwhile. Buffers (and parameters of another dtype
        than their average) are set aside in the average's memory instead: statistics re-estimated within the context
        go neither into the training model nor into the average.
        """
        self._refuse_if_applied("applied_to")
        undo = ExitStack()
        try:
            undo.callback(setattr, self, "_applied", False)
            self._applied = True
            with self._memory():
                for averaged, live in zip(self.module.parameters(), model.parameters(), strict=True):
                    if averaged.dtype == live.dtype:
                        _exchange(averaged.detach(), live.detach())
                        undo.callback(_exchange, averaged.detach(), live.detach())
                    else:
                        _lend(averaged.detach(), live.detach(), undo)
                for held, running in zip(self.module.buffers(), model.buffers(), strict=True):
                    _lend(held, running, undo)
            yield
        finally:
            with self._memory():
                undo.close()

    @torch.no_grad()
    def follow_frozen(self, model: nn.Module) -> None:
        """Let frozen parameters be their own average: `load_state_dict` may have brought that of earlier steps."""
        for averaged, live in zip(self.module.parameters(), model.parameters(), strict=True):
            if not live.requires_grad:
                averaged.copy_(live)

    def state_dict(self) -> dict[str, Any]:
        """As torch's AveragedModel: `n_averaged` and the averaged model's own keys after `module.`."""
        self._refuse_if_applied("state_dict")
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises RuntimeError, naming the keys, if it is of another model."""
        self._refuse_if_applied("load_state_dict")
        self._averaged.load_state_dict(state)

    def _refuse_if_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(f"WeightEma.{what} within applied_to: the averaged weights are in the live model")


def _copy_of(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """A deep copy without gradients whose parameters and buffers are made on `device`, one by one."""
    copies: dict[int, Any] = {}  # deepcopy takes an object found here by id for already copied
    for tensor in chain(model.parameters(), model.buffers()):
        is_parameter = isinstance(tensor, nn.Parameter)
        narrow = is_parameter and tensor.is_floating_point() and tensor.element_size() < 4
        dtype = torch.float32 if narrow else tensor.dtype
        copy = tensor.detach().to(device or tensor.device, dtype, copy=True)
        copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
    return deepcopy(model, copies)


def _exchange(averaged: Tensor, live: Tensor) -> None:
    """Swap the contents of two tensors of one shape and dtype, by way of one temporary where `averaged` lies."""
    own = live.to(averaged.device, copy=True)
    live.copy_(averaged)
    averaged.copy_(own)


def _lend(averaged: Tensor, live: Tensor, undo: ExitStack) -> None:
    """Copy `averaged` into `live`, whose own content is kept where `averaged` lies until `undo` puts it back."""
    own = live.to(averaged.device, copy=True)
    undo.callback(live.copy_, own)
    live.copy_(averaged)
