"""Training state in and out of DeepSpeed, under the names that every engine shares: one form for all ZeRO stages.

DeepSpeed's own checkpoints belong to one stage and one number of processes, and its converter knows Adam's states only.
Here each weight and Adamax state is assembled from the partitions of all processes, one tensor at a time, and cut up
again on loading. Stages 1 to 3 hold weights and states in flat partitions that the optimiser takes for its parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nvae_lowmem.training.engines.torch_engine import persistent_buffers

STATES = ("exp_avg", "exp_inf")


def portable_state(
    model: nn.Module, adamax: torch.optim.Optimizer, zero: Any, stage: int, *, collect: bool
) -> dict[str, Tensor]:
    """Buffers, weights, Adamax states and steps by name, on the host. All processes have to call it.

    collect: whether this one is to have them; the others get nothing.
    zero: DeepSpeed's optimiser around `adamax`. Before the first step there are no Adamax states.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    out = {f"buffer.{name}": b.detach().to("cpu", copy=True) for name, b in persistent_buffers(model).items()}
    flats = _flat_partitions(zero, stage)
    stepped = any("step" in adamax.state[t] for t in flats) if flats else bool(adamax.state)
    for name, parameter in model.named_parameters():
        if stage == 3 and not parameter.requires_grad:  # DeepSpeed knows the masters of what learns
            with deepspeed.zero.GatheredParameters(parameter):
                full = {"weight": parameter.detach().to("cpu", copy=True)}
        else:
            full = {"weight": safe_get_full_fp32_param(parameter) if stage == 3 else parameter.detach()}
        if stepped and parameter.requires_grad:
            for key in STATES:
                full[key] = safe_get_full_optimizer_state(parameter, key) if flats else adamax.state[parameter][key]
            full["step"] = adamax.state[flats[0] if flats else parameter]["step"]
        if collect:
            out |= {f"{key}.{name}": value.detach().to("cpu", copy=True) for key, value in full.items()}
    return out if collect else {}


@torch.no_grad()
def load_portable_state(
    state: dict[str, Tensor], model: nn.Module, adamax: torch.optim.Optimizer, zero: Any, stage: int
) -> None:
    """The inverse of `portable_state`: buffers, weights, and Adamax states where there are any, into DeepSpeed."""
    for name, buffer in persistent_buffers(model).items():
        buffer.copy_(state[f"buffer.{name}"])
    named = dict(model.named_parameters())
    steps = [state[key] for key in (f"step.{name}" for name in named) if key in state]
    flats = _flat_partitions(zero, stage)
    if steps:
        _make_states(adamax, flats or list(named.values()), step=max(steps))
        if stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()  # or DeepSpeed would not know of them before the first step
    for name, parameter in named.items():
        _set_weight(parameter, state[f"weight.{name}"], stage)
        for key in STATES if f"exp_avg.{name}" in state and parameter.requires_grad else ():
            value = state[f"{key}.{name}"]
            if stage == 0:
                adamax.state[parameter][key].copy_(value)
            else:
                _set_master(parameter, value, stage, key)


def _flat_partitions(zero: Any, stage: int) -> list[Tensor]:
    """The flat fp32 tensors that this process's optimiser updates; none at stage 0, where it has the parameters."""
    if stage == 0:
        return []
    return list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)


def _make_states(adamax: torch.optim.Optimizer, updated: list[Tensor], step: Tensor) -> None:
    """Gives every updated tensor the Adamax states that it would have after `step` steps without gradients."""
    for tensor in updated:
        own = adamax.state[tensor]
        own["step"] = step.clone()
        for key in STATES:
            if key in own:
                own[key].zero_()  # in place: DeepSpeed may hold views of it
            else:
                own[key] = torch.zeros_like(tensor.data)


def _set_weight(parameter: Tensor, weight: Tensor, stage: int) -> None:
    """The weight that the layers use and, where the optimiser has another, that one."""
    if stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.copy_(weight)
    else:
        parameter.copy_(weight)
    if stage > 0 and parameter.requires_grad:
        _set_master(parameter, weight, stage)


def _set_master(parameter: Tensor, value: Tensor, stage: int, key: str | None = None) -> None:
    """This process's share of an Adamax state, or without key of the optimiser's weight."""
    if stage < 3:
        parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
        return
    # DeepSpeed's own way for whole tensors fails where their size is not a multiple of the number of processes
    rank, share = torch.distributed.get_rank(), parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = torch.zeros(share * torch.distributed.get_world_size(), dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    parameter._z3_optimizer.set_local_hp_param(  # type: ignore[attr-defined]
        padded[rank * share : (rank + 1) * share], parameter, key
    )
