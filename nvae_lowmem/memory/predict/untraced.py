"""What a trace cannot see: library workspaces, ZeRO's buffers, the CUDA context, host memory; each with its source.

An entry is either known, and counted in the prediction, or an upper bound, and counted in its margin. A calibration
file replaces entries by what was measured on a card:

    [cudnn-workspace]
    nbytes = 12582912
    source = "GTX 970, torch 2.7.1, largest of all convolutions of cifar10"
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from nvae_lowmem.config.limits import shown
from nvae_lowmem.config.sections import MemoryPlan, Profile
from nvae_lowmem.config.tables import read_table
from nvae_lowmem.errors import ConfigError, raise_problems, unknown_name
from nvae_lowmem.hardware.card import DEFAULT_CONTEXT_BYTES, Card
from nvae_lowmem.hardware.cuda_memory import CAPPED_CUBLAS_CONFIG, CUDNN_WORKSPACE_BYTES
from nvae_lowmem.memory.trace.events import Allocation, Category, Phase, TextEnum, Trace, TraceWriter
from nvae_lowmem.units import KIB, LARGEST_BYTES, MIB


class Place(TextEnum):
    """Where the bytes of an entry lie."""

    ALLOCATOR = "allocator"
    """On the card, in blocks of the caching allocator."""
    CARD = "card"
    """On the card, outside the allocator."""
    HOST = "host"
    """Ordinary host memory."""
    PINNED = "page-locked"
    """Page-locked host memory."""


class Span(TextEnum):
    """For how long the bytes of an entry are held."""

    ALWAYS = "always"
    SETUP = "setup"
    """While the engine is built, on top of what stays."""
    BACKWARD = "backward"
    """In every backward pass."""
    UPDATE = "update"
    """In every update."""
    PRODUCT = "product"
    """Half from the first matrix product of a forward pass on, half from the first of a backward pass on."""
    CONVOLUTION = "convolution"
    """Around every convolution."""
    BIASED_PRODUCT = "biased product"
    """Around every matrix product with a bias."""


PHASE_SPANS = {Phase.BACKWARD: Span.BACKWARD, Phase.UPDATE: Span.UPDATE}
AROUND = {
    Span.CONVOLUTION: ("aten::convolution", "aten::convolution_backward"),
    Span.BIASED_PRODUCT: ("aten::addmm",),
}
"""Spans of single operations, and which these are."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")

DEFAULT_CUBLAS_CONFIG, _HOPPER_CUBLAS_CONFIG = ":4096:2:16:8", ":4096:8"

CUBLASLT_WORKSPACE_BYTES = 1 * MIB
"""What torch asks for at a matrix product with a bias where CUBLASLT_WORKSPACE_SIZE does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Bytes that no trace sees."""

    name: str
    nbytes: int
    place: Place = Place.ALLOCATOR
    span: Span = Span.ALWAYS
    source: str
    """Where the number comes from."""
    is_bound: bool = False
    """An upper bound of something unknown."""
    replaces_bytes: int = 0
    """Bytes of ordinary host memory in the trace that this entry stands in place of."""

    @property
    def is_replayed(self) -> bool:
        """Whether steps hold it in the allocator: such entries are put into the trace (`overlaid`)."""
        return self.place is Place.ALLOCATOR and self.span is not Span.SETUP

    @property
    def held(self) -> str:
        """Where it lies, and for how long, for people."""
        return f"{self.place}, {self.span}"


class MeasuredEntry(NamedTuple):
    """What was measured of an entry on a card."""

    nbytes: int
    source: str


def entries(
    profile: Profile,
    trace: Trace,
    accumulation: int,
    card: Card | None = None,
    context_bytes: int | None = None,
    calibration: Mapping[str, MeasuredEntry] | None = None,
) -> list[Entry]:
    """All entries for the profile's plan in one process, those of the calibration as measured: no longer bounds.

    trace: of the profile's model, for its parameters. context_bytes: what is outside the allocator, where known.
    """
    found = [
        *_libraries(profile.plan, card, context_bytes),
        *_averages(profile, trace),
        *engine_entries(profile.plan, trace.parameter_bytes, accumulation),
    ]
    for i, entry in enumerate(found):
        measured = (calibration or {}).get(entry.name)
        if measured is not None:
            found[i] = replace(entry, nbytes=measured.nbytes, source=measured.source, is_bound=False)
    return found


def runs_deepspeed(plan: MemoryPlan) -> bool:
    """Whether one process on one card runs the DeepSpeed engine under this plan."""
    return plan.engine == "deepspeed" or (plan.engine == "auto" and (plan.zero_stage == 3 or plan.offload_parameters))


def _libraries(plan: MemoryPlan, card: Card | None, context_bytes: int | None) -> list[Entry]:
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG") or (CAPPED_CUBLAS_CONFIG if plan.cap_bytes else "")
    if not config:
        hopper = card is not None and card.compute_capability >= (9, 0)
        config = _HOPPER_CUBLAS_CONFIG if hopper else DEFAULT_CUBLAS_CONFIG
    workspace = cublas_workspace_bytes(config)
    context = card.context_bytes if card is not None else DEFAULT_CONTEXT_BYTES
    return [
        Entry(
            name="cublas-workspaces", nbytes=2 * workspace, span=Span.PRODUCT,
            source=f"CUBLAS_WORKSPACE_CONFIG={config}: {workspace} bytes for each of the forward and backward threads",
        ),
        Entry(
            name="cublaslt-workspace", nbytes=CUBLASLT_WORKSPACE_BYTES, span=Span.BIASED_PRODUCT,
            source="torch asks for 1 MiB at each matrix product with a bias, and frees it (CUBLASLT_WORKSPACE_SIZE)",
        ),
        Entry(
            name="cudnn-workspace", nbytes=CUDNN_WORKSPACE_BYTES, span=Span.CONVOLUTION, is_bound=True,
            source=f"assumed: what CUDNN_CONV_WSCAP_DBG={CUDNN_WORKSPACE_BYTES // MIB} asks for (cuDNN 9.5.1 has "
            "the key conv_wscap_dbg in its libraries; whether an old card's heuristics obey it was not seen)",
        ),
        Entry(
            name="reductions", nbytes=1 * MIB, is_bound=True,
            source="staging of sums over many thread blocks in torch's kernels, below 1 MiB",
        ),
        Entry(
            name="batch-norm", nbytes=0,
            source="torch's own kernels need no reserve; the means and variances they save are in the trace",
        ),
        Entry(
            name="cuda-context", nbytes=context if context_bytes is None else context_bytes, place=Place.CARD,
            source="table of cards, or the budget",
        ),
    ]  # fmt: skip


def cublas_workspace_bytes(config: str) -> int:
    """Bytes of one workspace under CUBLAS_WORKSPACE_CONFIG, for example ":4096:2:16:8" (pairs of KiB and count).

    Raises ConfigError for anything else.
    """
    parts = config.split(":")[1:]
    if not config.startswith(":") or len(parts) % 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(
            f"CUBLAS_WORKSPACE_CONFIG={config!r} must be pairs of KiB and count, such as {CAPPED_CUBLAS_CONFIG} or "
            f"{DEFAULT_CUBLAS_CONFIG}: set it so, or unset it"
        )
    numbers = [int(part) for part in parts]
    return sum(size * count for size, count in zip(numbers[::2], numbers[1::2], strict=True)) * KIB


def _averages(profile: Profile, trace: Trace) -> list[Entry]:
    training = profile.training
    if not training.ema_decay or not training.ema_on_host:  # on the card they are in the trace
        return []
    weights = sum(a.nbytes for a in trace.allocations if a.category is Category.WEIGHT)
    return [Entry(name="averaged-weights", nbytes=weights, place=Place.HOST, source="one copy of weights and buffers")]


def engine_entries(plan: MemoryPlan, parameter_bytes: Sequence[int], accumulation: int) -> list[Entry]:
    """What the engine holds beyond a trace of its step. parameter_bytes: of each that learns, in fp32."""
    if runs_deepspeed(plan):
        return _zero(plan, parameter_bytes, accumulation)
    return _masters(plan, parameter_bytes)


def engine_host_bytes(plan: MemoryPlan, parameter_bytes: Sequence[int], accumulation: int) -> int:
    """Host memory of weights, gradients and states under the plan, averages and parked block inputs apart."""
    traced = 2 * sum(parameter_bytes) if plan.offload_optimizer else 0  # the host's weights and gradients
    return traced + untraced_host_bytes(engine_entries(plan, parameter_bytes, accumulation))


def untraced_host_bytes(overlay: Sequence[Entry]) -> int:
    """Host memory that the entries add to a trace's, the page-locked part included."""
    return sum(e.nbytes - e.replaces_bytes for e in overlay if e.place in (Place.HOST, Place.PINNED))


def _masters(plan: MemoryPlan, parameter_bytes: Sequence[int]) -> list[Entry]:
    """The torch engine's host side beyond the master weights and gradients, which are in the trace."""
    if not plan.offload_optimizer:
        return []
    n = sum(parameter_bytes)
    states = "exp_avg and exp_inf: 8 bytes per parameter"
    out = [Entry(name="adamax-states", nbytes=2 * n, place=Place.HOST, source=states)]
    if plan.pin_memory:
        locked = 2 * sum(map(pinned_bytes, parameter_bytes))
        source = "weights and gradients, each rounded up to a power of two by torch's allocator of pinned memory"
        out.append(Entry(name="pinned-masters", nbytes=locked, place=Place.PINNED, source=source, replaces_bytes=2 * n))
    return out


def pinned_bytes(nbytes: int) -> int:
    """What torch's allocator of page-locked memory takes for a request: the next power of two."""
    return 1 << (nbytes - 1).bit_length()


def _zero(plan: MemoryPlan, parameter_bytes: Sequence[int], accumulation: int) -> list[Entry]:
    """DeepSpeed's buffers, fp32 parameters, one process, no overlapped communication.

    n: bytes of all parameters, largest: of the largest. The trace has the weights (n), without offloading also the
    states (2n) and gradients (n), with it the host's weights and gradients (2n).
    """
    n, largest, bucket = sum(parameter_bytes), max(parameter_bytes), 4 * plan.bucket_elements
    stage, off = plan.zero_stage, plan.offload_optimizer

    def entry(name: str, nbytes: int, held: Place | Span, source: str, is_bound: bool = False) -> Entry:
        place, span = (held, Span.ALWAYS) if isinstance(held, Place) else (Place.ALLOCATOR, held)
        source = f"ZeRO {stage}: {source}"
        return Entry(name=f"zero-{name}", nbytes=nbytes, place=place, span=span, source=source, is_bound=is_bound)

    if stage == 0:
        return [entry("reduce", n, Span.UPDATE, "all gradients are flattened to be reduced")]
    out = [
        entry(
            "bucket",
            bucket,
            Span.ALWAYS if stage == 3 else Span.BACKWARD,
            "reduce bucket of plan.bucket_elements floats",
        ),
    ]
    if stage == 3:  # in the trace of the other stages: see flattened_weights
        out.append(
            entry("flatten", n, Span.SETUP, "the flat copy of the weights beside them, while partitions are made")
        )
    if off:
        gradients = n if accumulation > 1 and stage < 3 else 0
        host = 3 * n + largest + gradients
        out += [
            entry("host", host, Place.HOST, "states (2x), staging copy and largest gradient; accumulated gradients"),
            entry("gradient", largest, Span.ALWAYS, "staging of the largest gradient on its way to the host"),
        ]
        if stage == 1:
            out.append(entry("gradients", n, Span.BACKWARD, "gradients stay on the card to the end of backward"))
        if plan.pin_memory:
            out.append(entry("pinning", n, Place.PINNED, "pinned flat buffers are rounded up to a power of two", True))
    else:
        out += [
            entry("master", n, Span.ALWAYS, "a second fp32 copy of the weights, flat"),
            entry("step", 3 * n, Span.UPDATE, "Adamax's temporaries and the flat gradient, of the whole model", True),
        ]
    if stage == 3 and plan.offload_parameters:
        live = 2 * bucket + bucket * 2 // 5
        out += [
            entry("live", min(live, n), Span.ALWAYS, "gathered weights: twice the bucket and what is fetched ahead"),
            entry("host-weights", n, Place.HOST, "partitions of the weights"),
        ]
    return out


def load_calibration(path: str | os.PathLike[str]) -> dict[str, MeasuredEntry]:
    """Measured entries by name from a TOML or JSON file: tables of nbytes and source.

    Raises ConfigError with all problems.
    """
    where = f"calibration file {path}"
    table = read_table(path, where)
    raise_problems((problem for name, row in table.items() for problem in _row_problems(name, row)), where)
    return {name: MeasuredEntry(row["nbytes"], str(row.get("source", f"{path}"))) for name, row in table.items()}


CALIBRATED = ("cublas-workspaces", "cublaslt-workspace", "cudnn-workspace", "reductions", "batch-norm", "cuda-context")
"""Entries that depend on card, driver and libraries; all others are arithmetic."""


def _row_problems(name: str, row: Any) -> list[str]:
    if name not in CALIBRATED:
        return [unknown_name("entry", name, CALIBRATED)]
    nbytes = row.get("nbytes") if isinstance(row, Mapping) else None
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes <= LARGEST_BYTES:
        return [f"{name} must be a table with nbytes, a whole number from 0 to {LARGEST_BYTES:,}, not {shown(row)}"]
    return []


# --- the entries within a trace ---------------------------------------------------------------------------------------


def overlaid(trace: Trace, held: Sequence[Entry]) -> Trace:
    """The trace with the entries allocated and freed where libraries and engine do so, under Category.BUFFER."""
    writer = TraceWriter(trace)
    buffers = _Buffers(writer.trace, [entry for entry in held if entry.nbytes > 0])
    buffers.hold(Span.ALWAYS, Phase.SETUP)
    for start, end in pairwise(sorted({0, *trace.marks.values(), len(trace.events)})):
        for number, is_alloc in writer.span(start, end):
            a = trace.allocations[number]
            if is_alloc:
                buffers.enter(a.phase)
            writer.copy(number, is_alloc)
            if is_alloc and a.on_card:
                buffers.follow(a)
        buffers.end_phase()  # a phase ends with its step: what is held in it must not reach into the next
    return writer.finished()


class _Buffers:
    """Appends the allocations and frees of entries to a trace, keeping account of which are held."""

    def __init__(self, trace: Trace, entries: Sequence[Entry]) -> None:
        self._trace, self._entries = trace, entries
        self._phase: Phase | None = Phase.SETUP
        self._held: dict[Span, list[int]] = {}
        self._multiplied: set[Phase] = set()  # the phases that have had a matrix product

    def hold(self, span: Span, phase: Phase, parts: int = 1) -> None:
        """Allocate the entries of that span, or one of so many equal parts of each."""
        self._held[span] = [
            self._trace.allocate(entry.nbytes // parts, Category.BUFFER, entry.name, phase, entry.name)
            for entry in self._entries
            if entry.span is span
        ]

    def release(self, span: Span) -> None:
        """Free them."""
        for number in self._held.pop(span, ()):
            self._trace.free(number)

    def follow(self, a: Allocation) -> None:
        """What libraries allocate after an operation has allocated its result."""
        if a.operation in _PRODUCTS and a.phase in (Phase.FORWARD, Phase.BACKWARD) and a.phase not in self._multiplied:
            self._multiplied.add(a.phase)
            self.hold(Span.PRODUCT, a.phase, parts=2)  # each thread has a handle, and each handle a workspace
        for span, operations in AROUND.items():
            if a.operation in operations:
                self.hold(span, a.phase)
                self.release(span)

    def enter(self, phase: Phase) -> None:
        """A phase begins, or goes on."""
        if phase != self._phase:
            self.end_phase()
            self._phase = phase
            if phase in PHASE_SPANS:
                self.hold(PHASE_SPANS[phase], phase)

    def end_phase(self) -> None:
        """Free what is held for the phase alone."""
        if self._phase in PHASE_SPANS:
            self.release(PHASE_SPANS[self._phase])
        self._phase = None


def flattened_weights(trace: Trace) -> Trace:
    """The trace in which the engine lays all parameters into one flat tensor as it is built: ZeRO stages 1 and 2.

    The flat tensor is made beside the parameters, which are freed then; a second one of its size, the optimiser's copy
    on its way to the host or an empty gradient, comes and goes. What all that leaves in the cache is what steps meet.
    """
    end, left, parameters = trace.marks["setup done"], Counter(trace.parameter_bytes), []
    for number, a in enumerate(trace.allocations):
        # whatever they are counted as: a learned start is the input of the first block
        if a.born < end and a.category not in (Category.HOST, Category.BUFFER, Category.DATA) and left[a.nbytes] > 0:
            left[a.nbytes] -= 1
            parameters.append(number)
    writer = TraceWriter(trace)
    writer.copy_span(0, end)
    n = sum(trace.parameter_bytes)
    writer.trace.allocate(n, Category.WEIGHT, "", Phase.SETUP, "aten::cat")
    for number in parameters:
        writer.trace.free(writer.current[number])
    writer.trace.free(writer.trace.allocate(n, Category.BUFFER, "zero-copy", Phase.SETUP, "aten::clone"))
    writer.copy_span(end, len(trace.events))
    return writer.finished()


def without_weights(trace: Trace, smallest_bytes: int) -> Trace:
    """The trace without the weights of `smallest_bytes` and more, which then lie in host memory."""
    left = Counter(n for n in trace.parameter_bytes if n >= smallest_bytes)
    keep = []
    for a in trace.allocations:
        moves = a.category is Category.WEIGHT and left[a.nbytes] > 0
        if moves:
            left[a.nbytes] -= 1
        keep.append(not moves)
    return trace.only(keep)
