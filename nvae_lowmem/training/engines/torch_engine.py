"""The plain torch engine: one process, any device, autocast with a loss scale, states on the device or on the host."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.model.latents import Noise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import LossTerms, Objective
from nvae_lowmem.training.engines.engine import Update
from nvae_lowmem.training.engines.gradient_gate import GradientGate
from nvae_lowmem.training.engines.host_adamax import HostAdamax
from nvae_lowmem.training.engines.placement import OnDevice, OnHost, Placement

INITIAL_LOSS_SCALE = 2.0**16
GOOD_STEPS = "loss_scale_good_steps"
"""In a checkpoint: steps without an overflow since the loss scale last changed."""


class TorchEngine:
    """Engine of one process. With `plan.offload_optimizer` gradients leave the device as they appear.

    The Adamax states are 8 bytes per parameter, on the device or, with the master weights and gradients, on the host
    (16 bytes per parameter there; the device then holds 4, the weights).
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        objective: Objective,
        profile: Profile,
        device: torch.device,
        accumulation: int,
        make_optimizer: Callable[..., torch.optim.Adamax] = HostAdamax,
    ) -> None:
        """make_optimizer: another Adamax, for those who trace the step where the CPU stands for the card."""
        self.device = device
        tensors = itertools.chain(objective.parameters(), objective.buffers())
        there = all(t.device.type == device.type for t in tensors)
        self.objective = objective if there else objective.to(device)
        self._accumulation = accumulation
        self._clip_norm = profile.training.clip_norm
        self._gate = GradientGate(profile.training)
        parameters = [p for p in objective.parameters() if p.requires_grad]
        plan = profile.plan
        self._placement: Placement = (
            OnHost(parameters, plan.pin_memory) if plan.offload_optimizer else OnDevice(parameters)
        )
        updated = self._placement.held
        self._scaler: torch.amp.GradScaler | None = None
        if objective.autocast_dtype is torch.float16:
            self._scaler = torch.amp.GradScaler(updated[0].device.type, init_scale=INITIAL_LOSS_SCALE)
            self._scaler.scale(torch.zeros((), device=updated[0].device))  # makes the scale exist before the first step
        self.optimizer = make_optimizer(
            updated, eps=profile.training.adamax_eps, weight_decay=profile.training.weight_decay
        )
        self._placement.attach(self.optimizer, eager=self._scaler is None and not self._needs_norm)

    @property
    def _needs_norm(self) -> bool:
        return self._clip_norm > 0 or self._gate.active

    @property
    def model(self) -> NVAE:
        """The network itself."""
        return self.objective.model

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 but for fp16."""
        return self._scaler.get_scale() if self._scaler is not None else 1.0

    def begin(self, learning_rate: float) -> None:
        """A step begins, at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def forward(self, x: Tensor, noise: Noise, beta: float, labels: Tensor | None = None) -> LossTerms:
        """One micro-batch through the objective."""
        return self.objective(x, noise, beta, labels)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of loss x loss scale / accumulation."""
        self._placement.backward_begins(last)
        (loss * (self.loss_scale / self._accumulation)).backward()

    def update(self) -> Update:
        """Unscale, clip (the true gradients), one Adamax step unless they overflowed or are too large; frees them.

        The norm is that of the true gradient before clipping, None where nothing depends on it.
        """
        self._placement.collect()
        # 1. the true gradient and its norm
        scale = self.loss_scale
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        norm, refused, broken = None, False, False
        if self._needs_norm:
            norm = nn.utils.clip_grad_norm_(self._placement.held, self._clip_norm or math.inf, foreach=False)
            refused = self._gate.refuses(float(norm))
            broken = self._scaler is None and not math.isfinite(float(norm))
        # 2. the step, unless something speaks against it
        if self._scaler is not None:
            if not refused:
                self._scaler.step(self.optimizer)
            self._scaler.update()
        elif not refused and not broken:
            self._placement.step()
        # 3. gradients gone
        self._placement.release()
        overflow = broken or (self._scaler is not None and self.loss_scale < scale)
        return Update(overflow, norm, refused)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every parameter is whole; here they always are."""
        yield

    def state(self) -> dict[str, Tensor]:
        """Weights, Adamax states, buffers and the loss scale, by name, on the host."""
        out = {f"buffer.{name}": b for name, b in persistent_buffers(self.model).items()}
        out |= {f"weight.{name}": p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
        for name, held in self._held():
            out[f"weight.{name}"] = held.detach()
            for key in ("exp_avg", "exp_inf", "step"):
                if key in self.optimizer.state[held]:
                    out[f"{key}.{name}"] = self.optimizer.state[held][key]
        out["loss_scale"] = torch.tensor(self.loss_scale)
        if self._scaler is not None:
            out[GOOD_STEPS] = torch.tensor(self._scaler.state_dict()["_growth_tracker"])
        out |= self._gate.state()
        return {name: value.detach().cpu() for name, value in out.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(state[f"buffer.{name}"])
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[f"weight.{name}"])
        for name, held in self._held():
            held.copy_(state[f"weight.{name}"])
            if f"exp_avg.{name}" in state:
                own = self.optimizer.state[held]
                own["step"] = state[f"step.{name}"].clone()
                for key in ("exp_avg", "exp_inf"):
                    own[key] = state[f"{key}.{name}"].to(held.device, copy=True)
        self._gate.load_state(state)
        if self._scaler is not None and float(state.get("loss_scale", 1.0)) != 1.0:  # 1: saved by a run without fp16
            saved = {"scale": float(state["loss_scale"]), "_growth_tracker": int(state.get(GOOD_STEPS, 0))}
            self._scaler.load_state_dict(self._scaler.state_dict() | saved)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """(name, the tensor that the optimiser updates) of every parameter that learns."""
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return zip(names, self._placement.held, strict=True)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong in a checkpoint: running statistics and power-iteration vectors."""
    parameters = dict(model.named_parameters())
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in parameters}
