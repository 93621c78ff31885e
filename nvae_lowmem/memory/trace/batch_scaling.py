"""Traces of all batch sizes from two: every allocation's bytes are affine in the batch, and the order does not change.

The likelihood goes through the batch in chunks of a fixed number of images, so a larger batch has more of them: the
events of one chunk then happen so many times more (`Trace.chunks` says where they are).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nvae_lowmem.memory.trace.events import NotRepeatable, Trace, Window, repeat


class NotAffine(ValueError):
    """These two traces do not say what happens at that batch size: trace it itself. The text says why."""


def affine(first: Trace, second: Trace) -> Callable[[int], Trace]:
    """The function micro-batch -> Trace through the traces of two micro-batches of one profile, plan and accumulation.

    It holds for micro-batches in one chunk of the likelihood where both traces are so; and for whole chunks from the
    smaller trace's number up where both have whole chunks, two or more.

    Raises NotAffine, here and from the function, where that does not hold, events differ or bytes are not affine.
    """
    small, large = sorted((first, second), key=lambda trace: trace.micro_batch)
    step = large.micro_batch - small.micro_batch
    if step == 0:
        raise NotAffine(f"both traces have micro-batch {small.micro_batch}")
    extended, origins = _with_more_chunks(small, large.micro_batch)
    if extended.events != large.events:
        at = next((i for i, (a, b) in enumerate(zip(extended.events, large.events, strict=False)) if a != b), None)
        where = "one ends earlier" if at is None else f"they part at event {at}"
        raise NotAffine(f"micro-batches {small.micro_batch} and {large.micro_batch} have other events: {where}")
    slopes: dict[int, int] = {}
    for origin, a, b in zip(origins, extended.allocations, large.allocations, strict=True):
        slope, rest = divmod(b.nbytes - a.nbytes, step)
        if a.kind != b.kind or rest or slopes.setdefault(origin, slope) != slope:
            raise NotAffine(
                f"{a.operation} of block {a.block!r}: {a.nbytes} bytes at micro-batch {small.micro_batch}, {b.nbytes} "
                f"({b.operation} of {b.block!r}) at {large.micro_batch}"
            )

    def trace_at(micro_batch: int) -> Trace:
        more = micro_batch - small.micro_batch
        sized = [replace(a, nbytes=a.nbytes + slopes[n] * more) for n, a in enumerate(small.allocations)]
        if any(a.nbytes <= 0 for a in sized):
            raise NotAffine(f"micro-batch {micro_batch} is too far below {small.micro_batch}")
        made, _ = _with_more_chunks(replace(small, allocations=sized), micro_batch)
        return replace(made, micro_batch=micro_batch)

    return trace_at


def _with_more_chunks(trace: Trace, micro_batch: int) -> tuple[Trace, list[int]]:
    """The trace with as many chunks of the likelihood as that micro-batch has, and of each allocation its origin."""
    windows = _more_chunks(trace, micro_batch)
    try:
        return repeat(trace, windows)
    except NotRepeatable as error:
        raise NotAffine(f"a chunk of micro-batch {trace.micro_batch} cannot be repeated: {error}") from error


def _more_chunks(trace: Trace, micro_batch: int) -> list[Window]:
    """The windows of `trace` that happen more often at that larger micro-batch."""
    chunk = trace.chunk_images
    if max(trace.micro_batch, micro_batch) <= chunk:
        return []
    if trace.micro_batch % chunk or micro_batch % chunk or not 2 * chunk <= trace.micro_batch <= micro_batch:
        raise NotAffine(
            f"the likelihood takes {chunk} images at a time: micro-batch {micro_batch} cannot be made from one of "
            f"{trace.micro_batch}; both must be multiples, the latter {2 * chunk} or more and not above the former"
        )
    windows = []
    for starts in trace.chunks:
        period = len(starts) * chunk // trace.micro_batch  # an image may be cut into several chunks
        windows.append(Window(starts[0], starts[period], (micro_batch - trace.micro_batch) // chunk))
    return windows
