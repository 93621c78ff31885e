"""A pretended card for the tests of recording and measuring.

`FakeCuda` stands for torch.cuda: it serves requests with the simulated allocator, keeps the counters of memory_stats()
and writes the history that `_snapshot()` returns, with all that is in it beside allocations and frees.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvae_lowmem.hardware.budget import allocator_fraction
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, CachingAllocator, SimulatedOutOfMemory
from nvae_lowmem.memory.allocator.segments import MemoryBlock
from nvae_lowmem.memory.measure.cuda import CudaMonitor
from nvae_lowmem.units import GIB, MIB

CPU = torch.device("cpu")
CONTEXT_BYTES = 160 * MIB
WORKSPACE_BYTES = 128 << 10


class FakeCuda:
    """torch.cuda of a card of 4 GiB with a context of 160 MiB, the allocator capped at `cap_bytes`."""

    def __init__(self, cap_bytes: int = 0, text: str = "") -> None:
        self.total_bytes = 4 * GIB
        fraction = allocator_fraction(cap_bytes, self.total_bytes) if cap_bytes else 0.0
        parsed = AllocatorSettings.from_string(text)
        self.allocator = CachingAllocator(parsed, self.total_bytes, CONTEXT_BYTES, fraction)
        self.history: list[dict[str, Any]] = []
        self.memory = SimpleNamespace(
            _record_memory_history=lambda **_: None, _snapshot=lambda: {"segments": [], "device_traces": [self.history]}
        )
        self.observers: list[Any] = []
        self._addresses: dict[int, int] = {}
        self._waiting: dict[int, int] = {}  # block sizes by address: freed, but still read by another stream
        self._counts = {"allocated": 0, "freed": 0}
        self._looks = 0
        self._time = 0

    # -- what a program does to the card --

    def malloc(self, nbytes: int, stream: int = 0) -> MemoryBlock:
        try:
            block = self.allocator.malloc(nbytes)
        except SimulatedOutOfMemory:
            size = self.allocator.settings.round_size(nbytes)
            self.history.append({"action": "oom", "device_free": 0, "size": size, "stream": stream})
            for observer in self.observers:
                observer(0, nbytes, 0, 0)
            raise
        self._note("segment_alloc", 1 << 40, 2 * MIB, stream)  # the history tells of segments, too
        self._note("alloc", self._address(block), nbytes, stream)
        self._counts["allocated"] += 1
        return block

    def free(self, block: MemoryBlock) -> None:
        self.ask_free(block)
        self.complete_free(block)

    def ask_free(self, block: MemoryBlock) -> None:
        self._note("free_requested", self._address(block), block.requested, 0)
        self._waiting[id(block)] = block.size

    def complete_free(self, block: MemoryBlock) -> None:
        del self._waiting[id(block)]
        self._note("free_completed", self._addresses.pop(id(block)), block.requested, 0)
        self.allocator.free(block)
        self._counts["freed"] += 1

    def _address(self, block: MemoryBlock) -> int:
        return self._addresses.setdefault(id(block), 1 << 30 | id(block) << 4)

    def _note(self, action: str, address: int, size: int, stream: int) -> None:
        self._time += 1
        self.history.append(
            {"action": action, "addr": address, "size": size, "stream": stream, "time_us": self._time, "frames": []}
        )

    # -- what torch.cuda is asked --

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        s = self.allocator.stats
        return {
            "active.all.allocated": self._counts["allocated"],
            "active.all.freed": self._counts["freed"],
            "active_bytes.all.current": s.allocated_bytes,
            "active_bytes.all.peak": s.peak_allocated_bytes,
            "allocated_bytes.all.current": s.allocated_bytes - sum(self._waiting.values()),
            "allocated_bytes.all.peak": s.peak_allocated_bytes,
            "requested_bytes.all.current": s.requested_bytes,
            "requested_bytes.all.peak": s.peak_requested_bytes,
            "reserved_bytes.all.current": s.reserved_bytes,
            "reserved_bytes.all.peak": s.peak_reserved_bytes,
            "num_alloc_retries": s.retries,
            "num_ooms": s.ooms,
        }

    def memory_allocated(self, device: torch.device) -> int:
        return self.memory_stats(device)["allocated_bytes.all.current"]

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.allocator.reset_peaks()

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self._looks += 1
        if self._looks == 3:  # the first matrix product is behind us: its library keeps a workspace
            self.malloc(WORKSPACE_BYTES)
        return self.total_bytes - CONTEXT_BYTES - self.allocator.stats.reserved_bytes, self.total_bytes

    def set_device(self, device: torch.device) -> None: ...

    def synchronize(self, device: torch.device) -> None: ...

    def empty_cache(self) -> None:
        self.allocator.empty_cache()
        self._note("segment_free", 1 << 40, 2 * MIB, 0)


def watched(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch | None = None) -> CudaMonitor:
    if monkeypatch is not None:
        monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", cuda.observers.append, raising=False)
    return CudaMonitor(CPU, cuda)
