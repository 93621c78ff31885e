"""Blocks, the two pools of free blocks, and the two ways in which PyTorch's caching allocator gets device memory.

A segment is a chain of blocks (prev, next) without gaps. Each block is FREE (and listed in its pool), USED, or, in an
expandable segment, UNMAPPED: address space with no memory behind it. Merging keeps the left block, so the first block
of a segment is the same object for as long as the segment lives.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from nvae_lowmem.memory.allocator.settings import LARGE_SEGMENT_BYTES, SMALL_SEGMENT_BYTES

FREE, USED, UNMAPPED = 0, 1, 2
# Free blocks are found by the integer (size << ADDRESS_BITS) + address: one comparison instead of a tuple's two.
ADDRESS_BITS = 64
_TOP_ADDRESS = 1 << 62


class MemoryBlock:
    """A run of bytes in a segment, and the handle that malloc() returns."""

    __slots__ = ("address", "idle_since", "key", "next", "pool", "prev", "requested", "size", "state")

    def __init__(self, address: int, size: int, pool: FreePool, state: int = FREE) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.state = state
        self.key = 0  # place in the pool's list; meaningful while FREE
        self.requested = 0  # bytes asked for by the program; meaningful while USED
        self.idle_since = 0  # pool.searches when it became free: its age for garbage collection
        self.prev: MemoryBlock | None = None
        self.next: MemoryBlock | None = None

    @property
    def is_whole_segment(self) -> bool:
        """Whether the segment has no other block."""
        return self.prev is None and self.next is None

    def chain(self) -> Iterator[MemoryBlock]:
        """This block and those after it in the segment."""
        block: MemoryBlock | None = self
        while block is not None:
            yield block
            block = block.next

    def cut(self, size: int, state: int) -> MemoryBlock:
        """Shorten this block to `size` and return the rest, in `state` and linked behind it; no pool is touched."""
        rest = MemoryBlock(self.address + size, self.size - size, self.pool, state)
        after = rest.next = self.next
        if after is not None:
            after.prev = rest
        rest.prev = self
        self.next = rest
        self.size = size
        return rest

    def absorb_next(self) -> None:
        """Take over the block behind this one; no pool is touched."""
        swallowed = self.next
        assert swallowed is not None
        self.size += swallowed.size
        after = self.next = swallowed.next
        if after is not None:
            after.prev = self


class FreePool:
    """The free blocks of one pool in best-fit order (size, then address), and its unmapped ones by address."""

    __slots__ = ("blocks", "is_small", "keys", "min_remainder", "searches", "unmapped")

    def __init__(self, is_small: bool, min_remainder: int) -> None:
        self.is_small = is_small
        self.min_remainder = min_remainder  # bytes; a block is split if at least this much is left over
        self.keys: list[int] = []
        self.blocks: list[MemoryBlock] = []  # blocks[i] has keys[i]
        self.unmapped: list[MemoryBlock] = []
        self.searches = 0  # counted only while garbage collection is on

    @property
    def page_bytes(self) -> int:
        """What an expandable segment of this pool grows by."""
        return SMALL_SEGMENT_BYTES if self.is_small else LARGE_SEGMENT_BYTES

    def insert(self, block: MemoryBlock) -> None:
        """List a free block."""
        key = block.key = (block.size << ADDRESS_BITS) + block.address
        block.idle_since = self.searches
        index = bisect_left(self.keys, key)
        self.keys.insert(index, key)
        self.blocks.insert(index, block)

    def remove(self, block: MemoryBlock) -> None:
        """Take a free block from the list."""
        index = bisect_left(self.keys, block.key)
        del self.keys[index], self.blocks[index]

    def insert_unmapped(self, block: MemoryBlock) -> None:
        """List an unmapped block."""
        insort(self.unmapped, block, key=_address)


def _address(block: MemoryBlock) -> int:
    return block.address


class DeviceMemory:
    """What the device can still give: counts the bytes reserved from it. All figures in bytes."""

    __slots__ = ("available", "cap", "peak_reserved", "reserved", "total")

    def __init__(self, total: int, available: int, cap: int | None) -> None:
        self.total = total
        self.available = available  # total less what the context and other programs hold
        self.cap = cap  # set_per_process_memory_fraction(); None if it was not called
        self.reserved = 0
        self.peak_reserved = 0

    def under_cap(self, nbytes: int) -> bool:
        """Whether `nbytes` more stay within the cap."""
        return self.cap is None or self.reserved + nbytes <= self.cap

    def take(self, nbytes: int) -> bool:
        """Reserve `nbytes`, or return False if the device has not that much left."""
        if self.reserved + nbytes > self.available:
            return False
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def give_back(self, nbytes: int) -> None:
        """Return reserved bytes."""
        self.reserved -= nbytes


class FixedSegments:
    """The default: each segment is one cudaMalloc, given back only when all of it is free.

    A new segment lies above all earlier ones, or, with `falling`, below. That orders free blocks of equal size; a
    driver that hands out freed addresses again can choose differently between those.
    """

    def __init__(self, device: DeviceMemory, falling: bool = False) -> None:
        self._device = device
        self._falling = falling
        self._next_address = _TOP_ADDRESS if falling else 0
        self.heads: dict[int, MemoryBlock] = {}

    def grow(self, pool: FreePool, size: int, segment_bytes: int) -> MemoryBlock | None:
        """A block of at least `size` bytes, not listed as free; None if cap or device refuse."""
        if not self._device.under_cap(segment_bytes) or not self._device.take(segment_bytes):
            return None
        address = self._next_address - (segment_bytes if self._falling else 0)
        self._next_address = address if self._falling else address + segment_bytes
        block = self.heads[address] = MemoryBlock(address, segment_bytes, pool)
        return block

    def release(self, block: MemoryBlock) -> None:
        """Give a free block that is a whole segment back to the device."""
        block.pool.remove(block)
        del self.heads[block.address]
        self._device.give_back(block.size)

    def release_oversize(self, pool: FreePool, size: int, max_split_bytes: int) -> bool:
        """Free one unsplittable block of `size` or more, else the largest ones until they add up to it.

        Returns whether that much was freed: PyTorch's release_available_cached_blocks().
        """
        wanted = max(size, max_split_bytes)
        index = bisect_left(pool.keys, wanted << ADDRESS_BITS)
        if index < len(pool.blocks):
            self.release(pool.blocks[index])
            return True
        released = 0
        while released < wanted and pool.blocks and pool.blocks[-1].size >= max_split_bytes:
            released += pool.blocks[-1].size
            self.release(pool.blocks[-1])
        return released >= wanted

    def release_idle(self, pool: FreePool, excess: int) -> None:
        """Free whole segments of average age or more, round after round, until `excess` bytes are freed.

        A block's age is the number of searches in its pool since it became free. A round is not cut short when enough
        is freed: PyTorch's garbage_collect_cached_blocks() does not want to run at every miss.
        """
        idle = [block for block in pool.blocks if block.is_whole_segment]
        while excess > 0 and idle:
            mean_age = sum(pool.searches - block.idle_since for block in idle) / len(idle)
            old = [block for block in idle if pool.searches - block.idle_since >= mean_age]
            idle = [block for block in idle if pool.searches - block.idle_since < mean_age]
            for block in old:
                excess -= block.size
                self.release(block)

    def release_free(self, pools: Iterable[FreePool]) -> None:
        """Free every segment of `pools` that has no used block."""
        for pool in pools:
            for block in [block for block in pool.blocks if block.is_whole_segment]:
                self.release(block)


class ExpandableSegments:
    """expandable_segments:True: reserve address space once per pool, map pages into it as it is needed."""

    def __init__(self, device: DeviceMemory) -> None:
        self._device = device
        self._next_address = 0
        self.heads: dict[int, MemoryBlock] = {}

    def grow(self, pool: FreePool, size: int, segment_bytes: int) -> MemoryBlock | None:
        """A block of at least `size` bytes, not listed as free; None if cap or device refuse.

        The cap is tested with what a segment of fixed size would take, though less may be mapped: PyTorch does so.
        """
        if not self._device.under_cap(segment_bytes):
            return None
        start = self._find_room(pool, size)
        block = start if start.state == FREE else self._map(start, min(size, start.size))
        while block is not None and block.size < size:
            behind = block.next  # unmapped: _find_room() saw to it
            assert behind is not None
            block = self._map(behind, min(size - block.size, behind.size))
        if block is not None:
            pool.remove(block)
        return block

    def release_oversize(self, pool: FreePool, size: int, max_split_bytes: int) -> bool:
        """Pages are not freed by size: the allocator must go on to release_free()."""
        return False

    def release_idle(self, pool: FreePool, excess: int) -> None:
        """Garbage collection passes expandable segments by."""

    def release_free(self, pools: Iterable[FreePool]) -> None:
        """Unmap every page of `pools` that lies wholly in free blocks."""
        for pool in pools:
            for block in list(pool.blocks):
                self._unmap(block)

    def _find_room(self, pool: FreePool, size: int) -> MemoryBlock:
        """The first unmapped block, or the free one before it, from which `size` bytes are not in use."""
        for unmapped in pool.unmapped:
            before = unmapped.prev
            start = before if before is not None and before.state == FREE else unmapped
            room = 0
            for block in start.chain():
                if room >= size or block.state == USED:
                    break
                room += block.size
            if room >= size:
                return start
        # 9/8 of the card, so that pages can move to the end of the segment when holes in it are unmapped
        space = self._device.total + self._device.total // 8
        space = -(-space // pool.page_bytes) * pool.page_bytes
        head = self.heads[self._next_address] = MemoryBlock(self._next_address, space, pool, UNMAPPED)
        self._next_address += -(-space // LARGE_SEGMENT_BYTES) * LARGE_SEGMENT_BYTES  # on a page of either pool
        pool.insert_unmapped(head)
        return head

    def _map(self, block: MemoryBlock, size: int) -> MemoryBlock | None:
        """Put whole pages behind the first `size` bytes of an unmapped block; the free block that it joins, or None."""
        pool = block.pool
        mapped = -(-size // pool.page_bytes) * pool.page_bytes
        if not self._device.take(mapped):
            return None
        pool.unmapped.remove(block)
        if mapped < block.size:
            pool.insert_unmapped(block.cut(mapped, UNMAPPED))
        block.state = FREE
        block = join_neighbours(block)
        pool.insert(block)
        return block

    def _unmap(self, block: MemoryBlock) -> None:
        """Take the memory from all pages that lie wholly in a free block; keep the rest of it free."""
        pool, page = block.pool, block.pool.page_bytes
        begin = -(-block.address // page) * page - block.address
        end = (block.address + block.size) // page * page - block.address
        if begin >= end:
            return
        pool.remove(block)
        if end < block.size:
            pool.insert(block.cut(end, FREE))
        if begin > 0:
            kept, block = block, block.cut(begin, UNMAPPED)
            pool.insert(kept)
        block.state = UNMAPPED
        self._device.give_back(block.size)
        block = join_neighbours(block)
        if block.is_whole_segment:
            del self.heads[block.address]
        else:
            pool.insert_unmapped(block)


def join_neighbours(block: MemoryBlock) -> MemoryBlock:
    """Merge an unlisted block with neighbours of its own state, which leave the pool's lists; the merged block."""
    pool, state = block.pool, block.state
    delist = pool.remove if state == FREE else pool.unmapped.remove
    if block.next is not None and block.next.state == state:
        delist(block.next)
        block.absorb_next()
    if block.prev is not None and block.prev.state == state:
        block = block.prev
        delist(block)
        block.absorb_next()
    return block
