"""What to tell a person whose training ran out of memory: where, how much was planned and used, what to try next."""

from __future__ import annotations

import re
import traceback

import torch
from torch import nn

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.units import GIB, format_bytes

_PHASES = {"forward": "forward pass", "backward": "backward pass", "update": "update of the weights"}  # Engine's
_PARTS = {"training_step": "step", "_evaluate": "evaluation", "_draw": "sample pictures", "_save": "checkpoint"}
_SIGNS = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: of torch's allocator, a CUDA library, page-locked or host memory."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def report(error: BaseException, profile: Profile, blocks: nn.ModuleDict, device: torch.device) -> str:
    """The report, with the next setting to try. blocks: the model's, by name; error: with its traceback."""
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    size = f", which wanted {wanted[1]} more" if wanted else ""
    memory = "GPU memory" if device.type == "cuda" else "memory"
    lines = [f"out of {memory} in {_place(error, blocks)}{size}", *_plan_against_real(profile, device)]
    lines += [f"try next: {step}" for step in next_settings(profile)[:2]]
    lines.append("or let the planner choose: --auto-fit, or python tools/fit_memory.py --card auto --profile ...")
    return "\n  ".join(lines)


def _place(error: BaseException, blocks: nn.ModuleDict) -> str:
    """Phase and block, read from the frames that the error came through, outermost first."""
    names = {id(block): name for name, block in blocks.items()}
    phase, block, in_step = "the set-up", "", False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function = frame.f_code.co_name
        if function in _PARTS:
            phase, in_step = f"the {_PARTS[function]}", function == "training_step"
        elif in_step and function in _PHASES:
            phase, in_step = f"the {_PHASES[function]}", False
        block = names.get(id(frame.f_locals.get("self")), block)
    return f"{phase}, block {block}" if block else phase


def _plan_against_real(profile: Profile, device: torch.device) -> list[str]:
    plan, said = profile.plan, profile.provenance
    planned = []
    if plan.cap_bytes:
        planned.append(f"cap {format_bytes(plan.cap_bytes)}")
    for key, name in (("predicted_allocated_bytes", "allocated"), ("predicted_reserved_bytes", "reserved")):
        if int(said.get(key, 0)):
            planned.append(f"predicted {name} peak {format_bytes(int(said[key]))}")
    lines = [f"planned: {', '.join(planned) or 'nothing: this profile was not fitted to a card'}"]
    measured = {**cuda_memory.torch_memory(device), **cuda_memory.nvml_memory(device)}
    named = {
        "memory/peak_allocated_gib": "allocated peak",
        "memory/peak_reserved_gib": "reserved peak",
        "memory/others_gib": "other programs on the card",
    }
    real = [f"{name} {format_bytes(int(measured[key] * GIB))}" for key, name in named.items() if key in measured]
    return [*lines, f"measured: {', '.join(real)}"] if real else lines


def next_settings(profile: Profile) -> list[str]:
    """Settings that take less memory than the profile's plan, the cheapest in time first, as flags with reasons."""
    plan, out = profile.plan, []
    if plan.keep not in ("input", "host") or set(plan.keep_blocks.values()) & {"all", "cheap"}:
        out.append("--set plan.keep=input --set plan.keep_blocks={} (blocks keep their input only, a third slower)")
    if not plan.offload_optimizer:
        out.append("--set plan.offload_optimizer=true (gradients and Adamax states in host memory)")
    smaller = _smaller_micro_batch(profile)
    if smaller:
        out.append(f"--micro-batch {smaller} (as many images per step, in more passes)")
    if plan.keep != "host":
        out.append("--set plan.keep=host (block inputs in host memory, too)")
    out.append("fewer groups per scale, or a smaller image")
    return out


def _smaller_micro_batch(profile: Profile) -> int:
    """The largest divisor of the total batch up to half the plan's micro-batch; 0 where there is none."""
    halved, total_batch = profile.micro_batch() // 2, profile.training.total_batch
    return next((m for m in range(halved, 0, -1) if total_batch % m == 0), 0)
