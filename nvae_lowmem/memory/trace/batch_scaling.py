"""The trace of any batch size from two: events keep their order, and every allocation's bytes are affine in the batch.

    bytes(b) = bytes(b1) + slope (b - b1)

The likelihood works in chunks of a fixed number of images, so a larger batch has more chunks: the events of one chunk
(`Trace.chunks` says where they are) are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nvae_lowmem.memory.trace.events import NotRepeatable, Trace, Window, repeat


class NotAffine(ValueError):
    """Two traces do not determine that of a third batch size, which then must be traced. The text says why."""


def affine(first: Trace, second: Trace) -> Callable[[int], Trace]:
    """A function micro-batch -> trace, from traces of two micro-batches of one profile, plan and accumulation.

    Two cases are known. Both traces have one chunk of the likelihood: micro-batches that fit into one chunk. Both have
    two or more whole chunks: whole chunks, as many as the smaller trace has or more.

    Raises NotAffine, as does the function, for other micro-batches, where events differ, or bytes are not affine.
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
