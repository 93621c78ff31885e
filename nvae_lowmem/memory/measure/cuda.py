"""Records what a step asks of a real card. All that only CUDA can exercise is in this file.

Recording has to begin before the first allocation: `CudaMonitor` does so as it is made. Moments are counted in
allocations and completed frees, which the allocator itself counts, so that they fall exactly between two events.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from nvae_lowmem.config.sections import MemoryPlan
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.budget import allocator_fraction
from nvae_lowmem.memory.allocator.allocator import AllocatorStats
from nvae_lowmem.memory.allocator.recording import OUT_OF_MEMORY, Moment, RecordedCard, Recording, from_snapshot
from nvae_lowmem.memory.measure.measurement import CardStatistics
from nvae_lowmem.units import GIB

_PEAKS = ("allocated", "requested", "active", "reserved", "inactive_split")


class CudaMonitor:
    """Records one device from before its context exists; `close` when done.

    cuda: torch.cuda, or what acts like it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device = cuda, device
        self._moments: list[Moment] = []
        self.free_bytes: dict[str, int] = {}
        """What mem_get_info called free, by moment."""
        self.cublas_workspace_bytes = 0
        """What the first matrix product left behind in the allocator."""
        others = cuda_memory.nvml_memory(device).get("memory/card_used_gib")  # mem_get_info would make the context
        self.used_before_bytes = round(others * GIB) if others is not None else None
        cuda.set_device(device)
        cuda.synchronize(device)
        self.total_bytes = self._look("context")
        cuda.memory._record_memory_history(enabled="all", context=None, stacks="python")
        self._empty_cache = cuda.empty_cache
        cuda.empty_cache = self._emptied  # an event of its own, which the history does not tell from a retry
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
        if attach is not None:
            attach(self._ran_out)
        self.phase("libraries")
        self._first_operations()

    # -- moments --

    def phase(self, name: str) -> None:
        """A phase begins: requests from now on belong to it."""
        self._moments.append(Moment(self._counted(), "phase", name))

    def checkpoint(self, name: str) -> None:
        """Note the allocator's figures."""
        stats = self._cuda.memory_stats(self._device)
        self._moments.append(Moment(_counted(stats), "checkpoint", name, _as_stats(stats)))

    def note_free(self, name: str) -> None:
        """Note what is free on the card, once it is idle."""
        self._cuda.synchronize(self._device)
        self._look(name)

    def now(self) -> float:
        """Seconds, read when the card has finished all its work."""
        self._cuda.synchronize(self._device)
        return time.perf_counter()

    def _counted(self) -> int:
        return _counted(self._cuda.memory_stats(self._device))

    def _look(self, name: str) -> int:
        free, total = self._cuda.mem_get_info(self._device)
        self.free_bytes[name] = int(free)
        return int(total)

    def _emptied(self) -> None:
        self._moments.append(Moment(self._counted(), "empty cache"))
        self._empty_cache()

    def _ran_out(self, *_: Any) -> None:
        self.checkpoint(OUT_OF_MEMORY)

    # -- what there is to tell --

    def recording(self, name: str, plan: MemoryPlan, settings: str) -> Recording:
        """The requests so far; end them with a checkpoint. Raises ConfigError where the history has gaps."""
        history = self._cuda.memory._snapshot()["device_traces"][self._device.index or 0]
        capped = 0 < plan.cap_bytes < self.total_bytes
        fraction = allocator_fraction(plan.cap_bytes, self.total_bytes) if capped else 0.0
        outside = self.total_bytes - self.free_bytes["context"]
        return from_snapshot(name, history, self._moments, RecordedCard(settings, self.total_bytes, outside, fraction))

    def statistics(self) -> CardStatistics:
        """What the allocator and the driver say of the run until now."""
        stats = self._cuda.memory_stats(self._device)
        self.note_free("end")
        reserved = int(stats.get("reserved_bytes.all.current", 0))
        peaks = {f"peak_{name}_bytes": int(stats.get(f"{name}_bytes.all.peak", 0)) for name in _PEAKS}
        return CardStatistics(
            **peaks,
            retries=int(stats.get("num_alloc_retries", 0)),
            ooms=int(stats.get("num_ooms", 0)),
            total_bytes=self.total_bytes,
            used_before_context_bytes=self.used_before_bytes,
            free_bytes=dict(self.free_bytes),
            outside_allocator_bytes=self.total_bytes - self.free_bytes["end"] - reserved,
            cublas_workspace_bytes=self.cublas_workspace_bytes,
        )

    def extra_bytes(self, run: Callable[[], Any]) -> int | None:
        """The most bytes that `run` asks for beyond its result; None where there is not enough memory."""
        cuda, device = self._cuda, self._device
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
        try:
            kept = run()
        except torch.OutOfMemoryError:
            return None
        cuda.synchronize(device)
        stats = cuda.memory_stats(device)
        del kept
        return int(stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"])

    def close(self) -> None:
        """Stop recording."""
        self._cuda.empty_cache = self._empty_cache
        with contextlib.suppress(RuntimeError):  # a card that has failed takes no more orders
            self._cuda.memory._record_memory_history(enabled=None)

    def _first_operations(self) -> None:
        """The first convolution and the first matrix product: each loads a library, the latter keeps a workspace."""
        x = torch.ones(1, 8, 16, 16, device=self._device)
        out = F.conv2d(x, torch.ones(8, 8, 3, 3, device=self._device))
        self.note_free("first convolution")
        del x, out
        before = self._cuda.memory_allocated(self._device)
        x = torch.ones(64, 64, device=self._device)
        out = x @ x
        self.note_free("first matrix product")
        del x, out
        self.cublas_workspace_bytes = int(self._cuda.memory_allocated(self._device) - before)


def _counted(stats: Mapping[str, Any]) -> int:
    """Allocations and completed frees since the process began."""
    return int(stats.get("active.all.allocated", 0)) + int(stats.get("active.all.freed", 0))


def _as_stats(stats: Mapping[str, Any]) -> AllocatorStats:
    """PyTorch's figures as the simulator names them; "allocated" is what is active (see recording.py)."""

    def figure(key: str) -> int:
        return int(stats.get(key, 0))

    return AllocatorStats(
        allocated_bytes=figure("active_bytes.all.current"),
        peak_allocated_bytes=figure("active_bytes.all.peak"),
        requested_bytes=figure("requested_bytes.all.current"),
        peak_requested_bytes=figure("requested_bytes.all.peak"),
        reserved_bytes=figure("reserved_bytes.all.current"),
        peak_reserved_bytes=figure("reserved_bytes.all.peak"),
        retries=figure("num_alloc_retries"),
        ooms=figure("num_ooms"),
    )
