"""How the total batch of an optimiser step is shared out among processes and forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError


@dataclass(frozen=True)
class BatchSplit:
    """total = micro x accumulation x processes, all in images."""

    total: int
    micro: int
    accumulation: int
    processes: int

    def __str__(self) -> str:
        return (
            f"total batch {self.total} = micro-batch {self.micro} x accumulation {self.accumulation} "
            f"x processes {self.processes}"
        )

    def slots(self, rank: int) -> Sequence[slice]:
        """The sample slots within the total batch of every micro-batch of process `rank`, in order."""
        starts = [(index * self.processes + rank) * self.micro for index in range(self.accumulation)]
        return [slice(start, start + self.micro) for start in starts]


def split_batch(profile: Profile, processes: int) -> BatchSplit:
    """The split that the profile asks for. Raises ConfigError where the total batch does not divide."""
    total, micro = profile.training.total_batch, profile.micro_batch(processes)
    if total % processes:
        good = -(-total // processes) * processes
        raise ConfigError(
            f"training.total_batch = {total} cannot be divided among {processes} processes: use {good}, "
            "or start another number of processes"
        )
    share = total // processes
    if share % micro:
        fitting = ", ".join(str(m) for m in range(1, share + 1) if share % m == 0)
        raise ConfigError(
            f"plan.micro_batch = {micro} does not divide the {share} images of each process "
            f"(total batch {total} / {processes}): use one of {fitting}"
        )
    return BatchSplit(total, micro, share // micro, processes)
