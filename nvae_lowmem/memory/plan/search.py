"""The fastest assignment of policies to blocks that stays under a number of bytes.

Blocks run in a row. Block b starts at what all blocks before it keep, peaks above that, and leaves what it keeps:

    minimise  sum of seconds    subject to, for every b:  sum of kept before b + peak of b above its start <= room

That is a knapsack whose constraint holds for every prefix, so it is solved block by block over the states (bytes kept
so far, seconds so far): of two states with the same future, one that keeps no less and took no less time can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvae_lowmem.config.sections import Keep
from nvae_lowmem.memory.plan.block_costs import Choice

BlockChoices = Sequence[Sequence[Choice]]
MOST_STATES = 1024
"""States kept per block. With fewer the result is exact; beyond, the fastest of each 1/1024 of the room stays."""


@dataclass(frozen=True)
class Assignment:
    """One choice per block, in the order of a pass."""

    choices: tuple[Choice, ...]

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """The policies."""
        return tuple(c.keep for c in self.choices)

    @property
    def seconds(self) -> float:
        """Of all blocks, one micro-batch forward and backward."""
        return sum(c.seconds for c in self.choices)

    @property
    def host_bytes(self) -> int:
        """Block inputs parked in host memory."""
        return sum(c.host_bytes for c in self.choices)

    @property
    def peak_bytes(self) -> int:
        """The most on the card, above what lies there all the time."""
        level = peak = 0
        for c in self.choices:
            peak = max(peak, level + c.peak_above_start_bytes)
            level += c.kept_bytes
        return peak


def fastest(rows: BlockChoices, room_bytes: int) -> Assignment | None:
    """The assignment with the least seconds whose peak is at most `room_bytes`; None where there is none."""
    greedy = Assignment(tuple(min(row, key=lambda c: (c.seconds, c.kept_bytes)) for row in rows))
    if greedy.peak_bytes <= room_bytes:
        return greedy
    kept, seconds = np.zeros(1, dtype=np.int64), np.zeros(1)
    parents: list[npt.NDArray[np.int64]] = []
    picks: list[npt.NDArray[np.int64]] = []
    for row in rows:
        allowed = [np.flatnonzero(kept + c.peak_above_start_bytes <= room_bytes) for c in row]
        parent = np.concatenate(allowed)
        pick = np.repeat(np.arange(len(row)), [len(a) for a in allowed])
        kept = kept[parent] + np.array([c.kept_bytes for c in row], dtype=np.int64)[pick]
        seconds = seconds[parent] + np.array([c.seconds for c in row])[pick]
        if not len(kept):
            return None
        best = _undominated(kept, seconds, room_bytes)
        kept, seconds = kept[best], seconds[best]
        parents.append(parent[best])
        picks.append(pick[best])
    state = int(np.argmin(seconds))
    chosen: list[Choice] = []
    for row, parent, pick in zip(reversed(rows), reversed(parents), reversed(picks), strict=True):
        chosen.append(row[pick[state]])
        state = int(parent[state])
    return Assignment(tuple(chosen[::-1]))


def _undominated(
    kept: npt.NDArray[np.int64], seconds: npt.NDArray[np.float64], room_bytes: int
) -> npt.NDArray[np.int64]:
    """Indices of the states that no other beats in both, by rising bytes; at most about MOST_STATES of them."""
    order = np.lexsort((seconds, kept))
    ranked = seconds[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ranked)[:-1]))
    order = order[ranked < before]
    if len(order) > MOST_STATES:
        # within a sliver of the room the last state is the fastest; the very first stays, so that what fits still fits
        sliver = kept[order] // max(1, room_bytes // MOST_STATES)
        last = np.flatnonzero(np.append(sliver[1:] != sliver[:-1], True))
        order = order[np.union1d([0], last)]
    return order


def least_peak(rows: BlockChoices) -> Assignment:
    """The assignment with the smallest peak; of several, the fastest that is found for that room."""
    low, high = 0, Assignment(tuple(row[0] for row in rows)).peak_bytes
    best = fastest(rows, high)
    assert best is not None  # the one that `high` was made from
    while low < high:
        middle = (low + high) // 2
        found = fastest(rows, middle)
        if found is None:
            low = middle + 1
        else:
            best, high = found, min(middle, found.peak_bytes)
    return best
