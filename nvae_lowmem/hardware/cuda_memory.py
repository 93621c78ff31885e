"""The card under a run: the plan's cap put into force, and what torch and NVML say of the memory in use."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from nvae_lowmem.config.sections import MemoryPlan
from nvae_lowmem.errors import command_line
from nvae_lowmem.hardware.budget import allocator_fraction
from nvae_lowmem.units import GIB, MIB, format_bytes

CAPPED_CUBLAS_CONFIG = ":16:8"
"""CUBLAS_WORKSPACE_CONFIG under a cap: 128 KiB per handle and stream instead of 8.1 MiB."""
CUDNN_WORKSPACE_BYTES = 64 * MIB
"""The most that CUDNN_CONV_WSCAP_DBG allows a convolution's workspace under a cap."""


def prepare_environment(plan: MemoryPlan) -> None:
    """Settings that CUDA libraries read when they start; before anything touches the card. The user's own win."""
    if plan.allocator_settings:  # the name that every torch reads; the newer one is unknown to 2.7
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", plan.allocator_settings)
    if plan.cap_bytes:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CAPPED_CUBLAS_CONFIG)
        os.environ.setdefault("CUDNN_CONV_WSCAP_DBG", str(CUDNN_WORKSPACE_BYTES // MIB))


def apply_memory_cap(plan: MemoryPlan, device: torch.device) -> str:
    """Put the plan's cap into force on a CUDA device; what was done, in words."""
    if device.type != "cuda":
        return ""
    torch.backends.cudnn.benchmark = False  # trying out algorithms takes whatever memory is free
    if not plan.cap_bytes:
        return "no memory cap: plan.cap_bytes is 0"
    total = torch.cuda.get_device_properties(device).total_memory
    if plan.cap_bytes >= total:
        return (
            f"memory cap {format_bytes(plan.cap_bytes)} is more than this card has ({format_bytes(total)}): no cap set"
        )
    torch.cuda.set_per_process_memory_fraction(allocator_fraction(plan.cap_bytes, total), device)
    return f"memory cap {format_bytes(plan.cap_bytes)} of {format_bytes(total)}"


def torch_memory(device: torch.device) -> dict[str, float]:
    """Peaks of the CUDA allocator so far in GiB, and its retries; empty without CUDA."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    return {
        "memory/peak_allocated_gib": stats.get("allocated_bytes.all.peak", 0) / GIB,
        "memory/peak_reserved_gib": stats.get("reserved_bytes.all.peak", 0) / GIB,
        "memory/alloc_retries": float(stats.get("num_alloc_retries", 0)),
    }


def nvml_memory(device: torch.device) -> dict[str, float]:
    """What NVML says of the card: GiB used by this process and by others, utilisation, temperature.

    Left out is what the driver does not tell: under WDDM (Windows) the use per process is None.
    """
    if device.type != "cuda":
        return {}
    import pynvml

    out: dict[str, float] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return out
    try:
        handle = _handle(pynvml, device)
        with contextlib.suppress(pynvml.NVMLError):
            used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            ours = next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
            out["memory/card_used_gib"] = used / GIB
            if ours is not None:
                out["memory/process_gib"] = ours / GIB
                out["memory/others_gib"] = (used - ours) / GIB
        with contextlib.suppress(pynvml.NVMLError):
            out["card/utilisation_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(pynvml.NVMLError):
            sensor = pynvml.NVML_TEMPERATURE_GPU
            out["card/temperature_celsius"] = float(pynvml.nvmlDeviceGetTemperature(handle, sensor))
    finally:
        pynvml.nvmlShutdown()
    return out


def _handle(pynvml: Any, device: torch.device) -> Any:
    """By UUID: NVML numbers all cards, torch only the visible ones."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        with contextlib.suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    return pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)


def predicted_vs_measured(predicted_bytes: int, margin_bytes: int, device: torch.device) -> str:
    """Measured against predicted peak in words; empty without CUDA or prediction."""
    if device.type != "cuda" or not predicted_bytes:
        return ""
    measured = torch.cuda.max_memory_allocated(device)
    difference = measured / predicted_bytes - 1
    text = (
        f"peak after 3 steps: measured {format_bytes(measured)}, predicted {format_bytes(predicted_bytes)} "
        f"({difference:+.1%})"
    )
    if measured > predicted_bytes + margin_bytes:
        measuring = command_line("measure-memory")
        text += f"; WARNING: more than the margin above the prediction: measure this card with {measuring}"
    return text
