"""What to tell a person whose training ran out of memory: where, how much was planned and used, what to try next."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping

import torch
from torch import nn

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import command_line
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.gpu_facts import BUSY_CARD_BYTES
from nvae_lowmem.units import GIB, format_bytes

SET_UP, FORWARD, BACKWARD, UPDATE = "set-up", "forward pass", "backward pass", "update of the weights"
_STEP = "step"  # outside its three phases: its images, its sums
_PHASES = {"forward": FORWARD, "backward": BACKWARD, "update": UPDATE}  # Engine's
_PARTS = {"training_step": _STEP, "_evaluate": "evaluation", "_draw": "sample pictures", "_save": "checkpoint"}
_SIGNS = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: of torch's allocator, a CUDA library, page-locked or host memory."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def report(error: BaseException, profile: Profile, blocks: nn.ModuleDict, device: torch.device) -> str:
    """The report, with the next settings to try.

    error: with its traceback; profile: with the engine that runs in its plan; blocks: the model's, by name.
    """
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    size = f", which wanted {wanted[1]} more" if wanted else ""
    memory = "GPU memory" if device.type == "cuda" else "memory"
    phase, block = _place(error, blocks)
    place = f"the {phase}, block {block}" if block else f"the {phase}"
    measured = {**cuda_memory.torch_memory(device), **cuda_memory.nvml_memory(device)}
    lines = [f"out of {memory} in {place}{size}", *_plan_against_real(profile, measured)]
    others = int(measured.get("memory/others_gib", 0) * GIB)
    settings = next_settings(profile, phase)
    if others > BUSY_CARD_BYTES:
        settings.insert(0, f"close the other programs on the card, which take {format_bytes(others)} of it")
    lines += [f"try next: {advice}" for advice in settings[:2]]
    if "--auto-fit" in str(profile.provenance.get("command", "")):
        measuring, fitting = command_line("measure-memory"), command_line("fit-memory")
        lines.append(f"or measure this card ({measuring}) and plan with that: {fitting} --calibration")
    else:
        lines.append(
            f"or let the planner choose: --auto-fit, or {command_line('fit-memory')} --card auto --profile ..."
        )
    return "\n  ".join(lines)


def _place(error: BaseException, blocks: nn.ModuleDict) -> tuple[str, str]:
    """(phase, block or ""), read from the frames that the error came through, outermost first."""
    names = {id(block): name for name, block in blocks.items()}
    phase, block = SET_UP, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function = frame.f_code.co_name
        if phase == _STEP and function in _PHASES:
            phase = _PHASES[function]
        elif function in _PARTS:
            phase = _PARTS[function]
        block = names.get(id(frame.f_locals.get("self")), block)
    return phase, block


def _plan_against_real(profile: Profile, measured: Mapping[str, float]) -> list[str]:
    plan, said = profile.plan, profile.provenance
    planned = []
    if plan.cap_bytes:
        planned.append(f"cap {format_bytes(plan.cap_bytes)}")
    for key, name in (("predicted_allocated_bytes", "allocated"), ("predicted_reserved_bytes", "reserved")):
        if int(said.get(key, 0)):
            planned.append(f"predicted {name} peak {format_bytes(int(said[key]))}")
    lines = [f"planned: {', '.join(planned) or 'nothing: this profile was not fitted to a card'}"]
    named = {
        "memory/peak_allocated_gib": "allocated peak",
        "memory/peak_reserved_gib": "reserved peak",
        "memory/others_gib": "other programs on the card",
    }
    real = [f"{name} {format_bytes(int(measured[key] * GIB))}" for key, name in named.items() if key in measured]
    return [*lines, f"measured: {', '.join(real)}"] if real else lines


def next_settings(profile: Profile, phase: str = FORWARD) -> list[str]:
    """Settings that take less memory in this phase than the profile's plan, the cheapest in time first, with reasons.

    None that the plan has already, and none that does nothing for the phase: what blocks keep is of no concern before
    the first step, nor when weights are updated or pictures are drawn.
    """
    plan, training = profile.plan, profile.training
    kept = {plan.keep, *plan.keep_blocks.values()}
    trains, passes = phase in (_STEP, FORWARD, BACKWARD), phase not in (SET_UP, UPDATE)
    smaller = _smaller_micro_batch(profile) if passes or (phase == SET_UP and profile.model.data_init) else 0
    # On the torch engine the Adamax states come with the first update; DeepSpeed copies the weights before.
    deepspeed = plan.engine == "deepspeed"
    states = phase != SET_UP or deepspeed
    out = []
    if training.ema_decay and not training.ema_on_host:
        out.append("--set training.ema_on_host=true (averaged weights in host memory)")
    if trains and kept & {"all", "cheap"} and "host" not in kept:
        out.append("--set plan.keep=input --set plan.keep_blocks={} (blocks keep their input only, a third slower)")
    if states and not plan.offload_optimizer:
        stage = "--set plan.zero_stage=2 " if deepspeed and plan.zero_stage == 0 else ""
        out.append(f"{stage}--set plan.offload_optimizer=true (gradients and Adamax states in host memory)")
    if smaller:
        out.append(f"--micro-batch {smaller} (as many images per step, in more passes)")
    if trains and kept != {"host"}:
        out.append("--set plan.keep=host --set plan.keep_blocks={} (block inputs in host memory, too)")
    if deepspeed and plan.zero_stage == 3 and not plan.offload_parameters:
        out.append("--set plan.offload_parameters=true (the weights in host memory, too)")
    out.append("fewer groups per scale, fewer channels, or a smaller image")
    return out


def _smaller_micro_batch(profile: Profile) -> int:
    """The largest divisor of the total batch up to half the plan's micro-batch; 0 where there is none."""
    halved, total_batch = profile.micro_batch() // 2, profile.training.total_batch
    return next((m for m in range(halved, 0, -1) if total_batch % m == 0), 0)
