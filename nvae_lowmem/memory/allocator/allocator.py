"""PyTorch's CUDA caching allocator, simulated to the byte, for one device and one stream.

    allocator = CachingAllocator(AllocatorSettings.from_string("expandable_segments:True"), total_bytes=4 << 30)
    block = allocator.malloc(1000)
    allocator.free(block)
    allocator.stats.peak_reserved_bytes

A request is rounded up to a block size and looked for in the small (up to 1 MiB) or the large pool, best fit first. A
block that is larger than needed is split; a miss takes a new segment from the device; a refused segment makes the
allocator give back what it caches and try again, before it raises SimulatedOutOfMemory.

`python -m nvae_lowmem.memory.allocator DIR` replays a folder of recordings: see recording.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nvae_lowmem.errors import ConfigError
from nvae_lowmem.memory.allocator.segments import (
    ADDRESS_BITS,
    FREE,
    UNMAPPED,
    USED,
    DeviceMemory,
    ExpandableSegments,
    FixedSegments,
    FreePool,
    MemoryBlock,
    join_neighbours,
)
from nvae_lowmem.memory.allocator.settings import (
    MIN_BLOCK_BYTES,
    SMALL_LIMIT_BYTES,
    UNLIMITED_BYTES,
    AllocatorSettings,
    round_to_block,
    segment_size,
)
from nvae_lowmem.units import format_bytes

__all__ = [
    "AllocatorSettings", "AllocatorStats", "CachingAllocator", "Replay", "SegmentSnapshot", "SimulatedOutOfMemory",
]  # fmt: skip

CHECKPOINT, FREE_ID, EMPTY_CACHE = 0, -1, -3
"""The events (op, id) that are not an allocation: note the statistics; free `id`; empty_cache()."""


class SimulatedOutOfMemory(Exception):
    """No segment for a request, even after the cache was given back. All figures in bytes."""

    def __init__(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, cap_bytes: int) -> None:
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.cap_bytes = cap_bytes
        super().__init__(requested_bytes, allocated_bytes, reserved_bytes, cap_bytes)  # so that it can be pickled

    def __str__(self) -> str:
        return (
            f"cannot allocate {format_bytes(self.requested_bytes)}: {format_bytes(self.allocated_bytes)} allocated "
            f"and {format_bytes(self.reserved_bytes)} reserved of {format_bytes(self.cap_bytes)}"
        )


@dataclass(frozen=True)
class AllocatorStats:
    """What torch.cuda.memory_stats() reports, in bytes; `peak_...` since the start or the last reset_peaks()."""

    allocated_bytes: int
    """Sizes of the blocks in use: what was requested, rounded up, and what was not worth splitting off."""
    peak_allocated_bytes: int
    requested_bytes: int
    """What the program asked for."""
    peak_requested_bytes: int
    reserved_bytes: int
    """Taken from the device: blocks in use and cached ones."""
    peak_reserved_bytes: int
    retries: int
    """num_alloc_retries: how often the cache was given back because a segment was refused."""
    ooms: int


@dataclass(frozen=True)
class SegmentSnapshot:
    """A snapshot of one segment: its blocks in address order as (size in bytes, "free" | "used" | "unmapped")."""

    address: int
    pool: str
    """ "small" or "large"."""
    blocks: tuple[tuple[int, str], ...]

    @property
    def total_bytes(self) -> int:
        """The address space of the segment."""
        return sum(size for size, _ in self.blocks)

    @property
    def mapped_bytes(self) -> int:
        """The memory behind it: all of it, but for an expandable segment."""
        return sum(size for size, state in self.blocks if state != "unmapped")


@dataclass(frozen=True)
class Replay:
    """What a replayed trace showed."""

    checkpoints: tuple[AllocatorStats, ...]
    """One per CHECKPOINT event before the end or the failure, and one for the state after the last event."""
    oom_index: int | None
    """Index of the event that ran out of memory, if one did; the replay stops there."""
    oom: SimulatedOutOfMemory | None


class CachingAllocator:
    """The allocator of one device, with nothing allocated.

    `total_bytes` is the whole memory of the card; `context_bytes` is what the CUDA context and other programs hold of
    it; `memory_fraction` is set_per_process_memory_fraction()'s share of `total_bytes` (0: not called);
    `falling`: each new segment lies below all earlier ones, where the driver goes downwards, instead of above.
    Raises ConfigError when these do not describe a card.
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        total_bytes: int,
        context_bytes: int = 0,
        memory_fraction: float = 0.0,
        falling: bool = False,
    ) -> None:
        if not 0 <= context_bytes <= total_bytes or total_bytes == 0:
            raise ConfigError(
                f"total_bytes {total_bytes} and context_bytes {context_bytes}: need 0 <= context <= total"
            )
        if not 0.0 <= memory_fraction <= 1.0:
            raise ConfigError(f"memory_fraction {memory_fraction} must lie between 0 (no cap) and 1 (the whole card)")
        cap = int(memory_fraction * total_bytes) if memory_fraction else None
        self.settings = settings
        self._device = DeviceMemory(total_bytes, total_bytes - context_bytes, cap)
        expandable = settings.expandable_segments
        self._source: FixedSegments | ExpandableSegments = (
            ExpandableSegments(self._device) if expandable else FixedSegments(self._device, falling)
        )
        self._small = FreePool(is_small=True, min_remainder=MIN_BLOCK_BYTES)
        self._large = FreePool(
            is_small=False, min_remainder=MIN_BLOCK_BYTES if expandable else SMALL_LIMIT_BYTES + MIN_BLOCK_BYTES
        )
        threshold = settings.garbage_collection_threshold
        self._gc_bytes = int(threshold * cap) if threshold and cap is not None else None
        # What malloc() looks at for every request, worked out once.
        self._rounds_up = any(divisions > 1 for divisions in settings.roundup_power2_divisions)
        self._refuses_fits = expandable or settings.max_split_bytes < UNLIMITED_BYTES or self._gc_bytes is not None
        self._unsplit_from = UNLIMITED_BYTES if expandable else settings.max_split_bytes
        self._allocated = self._requested = self._peak_allocated = self._peak_requested = 0
        self._retries = self._ooms = 0

    @property
    def stats(self) -> AllocatorStats:
        """The statistics as they are now."""
        return AllocatorStats(
            allocated_bytes=self._allocated,
            peak_allocated_bytes=self._peak_allocated,
            requested_bytes=self._requested,
            peak_requested_bytes=self._peak_requested,
            reserved_bytes=self._device.reserved,
            peak_reserved_bytes=self._device.peak_reserved,
            retries=self._retries,
            ooms=self._ooms,
        )

    def malloc(self, nbytes: int) -> MemoryBlock:
        """Allocate `nbytes` (at least 1) and return the block, to be given to free().

        Raises SimulatedOutOfMemory when neither the cache nor the device has room, and ValueError when nbytes < 1.
        """
        if self._rounds_up or nbytes < MIN_BLOCK_BYTES:
            if nbytes < 1:
                raise ValueError(f"malloc({nbytes}): at least 1 byte")  # PyTorch never asks for less
            size = self.settings.round_size(nbytes)
        else:
            size = round_to_block(nbytes)
        pool = self._small if size <= SMALL_LIMIT_BYTES else self._large
        keys = pool.keys
        index = bisect_left(keys, size << ADDRESS_BITS)
        if self._refuses_fits:
            index = self._accepted_fit(pool, index, size)
        if index < len(keys):
            del keys[index]
            block = pool.blocks.pop(index)
        else:
            block = self._miss(pool, size, nbytes)

        remainder = block.size - size
        if remainder >= pool.min_remainder and size < self._unsplit_from:
            pool.insert(block.cut(size, FREE))
        else:
            size = block.size
        block.state = USED
        block.requested = nbytes
        self._allocated = allocated = self._allocated + size
        if allocated > self._peak_allocated:
            self._peak_allocated = allocated
        self._requested = requested = self._requested + nbytes
        if requested > self._peak_requested:
            self._peak_requested = requested
        return block

    def free(self, block: MemoryBlock) -> None:
        """Return a block from malloc() to its pool, merged with its free neighbours.

        Raises ValueError when the block is not in use.
        """
        if block.state != USED:
            raise ValueError(f"free() of a block of {block.size} bytes that is not in use: freed twice?")
        block.state = FREE
        self._allocated -= block.size
        self._requested -= block.requested
        block = join_neighbours(block)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Give every segment without a used block (expandable: every wholly free page) back to the device."""
        self._source.release_free((self._large, self._small))

    def reset_peaks(self) -> None:
        """Restart all peaks from the present figures: torch.cuda.reset_peak_memory_stats()."""
        self._peak_allocated, self._peak_requested = self._allocated, self._requested
        self._device.peak_reserved = self._device.reserved

    def segments(self) -> list[SegmentSnapshot]:
        """All segments in address order."""
        names = {FREE: "free", USED: "used", UNMAPPED: "unmapped"}
        return [
            SegmentSnapshot(
                address=address,
                pool="small" if head.pool.is_small else "large",
                blocks=tuple((block.size, names[block.state]) for block in head.chain()),
            )
            for address, head in sorted(self._source.heads.items())
        ]

    def replay(self, events: Iterable[Sequence[int]]) -> Replay:
        """Run events (op, id): op > 0 allocates op bytes as `id`; else CHECKPOINT, FREE_ID or EMPTY_CACHE.

        Stops where memory runs out. Raises ValueError for an unknown op, an id allocated twice or not at all.
        """
        malloc, free = self.malloc, self.free
        live: dict[int, MemoryBlock] = {}
        checkpoints: list[AllocatorStats] = []
        for index, (op, name) in enumerate(events):
            if op > 0:
                if name in live:
                    raise ValueError(f"event {index}: allocates id {name}, which is still in use")
                try:
                    live[name] = malloc(op)
                except SimulatedOutOfMemory as error:
                    return Replay((*checkpoints, self.stats), index, error)
            elif op == FREE_ID:
                block = live.pop(name, None)
                if block is None:
                    raise ValueError(f"event {index}: frees id {name}, which is not in use")
                free(block)
            elif op == CHECKPOINT:
                checkpoints.append(self.stats)
            elif op == EMPTY_CACHE:
                self.empty_cache()
            else:
                raise ValueError(f"event {index}: op {op} is neither an allocation nor one of -1, 0, -3")
        return Replay((*checkpoints, self.stats), None, None)

    def _accepted_fit(self, pool: FreePool, index: int, size: int) -> int:
        """The block to take when the best fit is blocks[index]; len(blocks), that is a miss, if it is refused."""
        if self._gc_bytes is not None:
            pool.searches += 1
        blocks = pool.blocks
        count = len(blocks)
        if index == count:
            return count
        if self.settings.expandable_segments:
            # Prefer the block that can grow least, to keep room where a segment can still be extended.
            while index + 1 < count and _growable_size(blocks[index + 1]) < _growable_size(blocks[index]):
                index += 1
        max_split, found = self.settings.max_split_bytes, blocks[index].size
        if size < max_split:
            return index if found < max_split else count
        return index if found < size + self.settings.max_non_split_rounding_bytes else count

    def _miss(self, pool: FreePool, size: int, nbytes: int) -> MemoryBlock:
        """A block from the device, after giving back as much of the cache as it takes; raises SimulatedOutOfMemory."""
        source, settings = self._source, self.settings
        segment_bytes = segment_size(size)
        if self._gc_bytes is not None:
            source.release_idle(self._large, self._device.reserved - self._gc_bytes)
        block = source.grow(pool, size, segment_bytes)
        if (
            block is None
            and settings.max_split_bytes < UNLIMITED_BYTES
            and source.release_oversize(pool, size, settings.max_split_bytes)
        ):
            block = source.grow(pool, size, segment_bytes)
        if block is None:
            self.empty_cache()
            self._retries += 1
            block = source.grow(pool, size, segment_bytes)
        if block is None:
            self._ooms += 1
            device = self._device
            cap = device.available if device.cap is None else min(device.cap, device.available)
            raise SimulatedOutOfMemory(nbytes, self._allocated, device.reserved, cap)
        return block


def _growable_size(block: MemoryBlock) -> int:
    """Bytes of a free block of an expandable segment, with the unmapped space behind it."""
    after = block.next
    return block.size + after.size if after is not None and after.state == UNMAPPED else block.size
