"""Measured runs of a nano model for the tests of measuring: a real one on the CPU, one on a card that is played."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fake_cuda import CPU, WORKSPACE_BYTES, FakeCuda, watched

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.memory.allocator.recording import Recording
from nvae_lowmem.memory.allocator.segments import MemoryBlock
from nvae_lowmem.memory.measure.convolutions import Workspaces
from nvae_lowmem.memory.measure.job import Ended, Job, Outcome, measure
from nvae_lowmem.memory.measure.measurement import Measurement
from nvae_lowmem.memory.measure.worker import about_machine
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.units import GIB, MIB
from profiles import NANO, profile_of

CAP_BYTES = GIB


def nano(micro_batch: int = 2, total_batch: int = 4, **plan: Any) -> Profile:
    base = profile_of(NANO, micro_batch=micro_batch, **{"keep": "input", "precision": "fp16", **plan})
    return replace(base, name="nano", training=replace(base.training, total_batch=total_batch))


@cache
def on_cpu() -> Outcome:
    """A real child of this machine."""
    job = Job(name="nano", profile=nano(offload_optimizer=True), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        return measure(job, Path(folder))


def played(profile: Profile, steps: int = 3, leak_bytes: int = 0) -> tuple[Recording, Measurement]:
    """The traced steps asked of a pretended card."""
    cuda = FakeCuda(CAP_BYTES)
    monitor = watched(cuda)
    cuda.malloc(WORKSPACE_BYTES)  # the backward thread's
    accumulation = profile.training.total_batch // profile.plan.micro_batch
    trace = trace_training(profile, profile.plan.micro_batch, accumulation, steps)
    ends = {at: name for name, at in trace.marks.items()}
    blocks: dict[int, MemoryBlock] = {}
    phase = ""
    for i, (a, is_alloc) in enumerate(trace.walk()):
        if i in ends:
            monitor.checkpoint(ends[i])
        if not a.on_card:
            continue
        if not is_alloc:
            cuda.free(blocks.pop(a.born))
            continue
        if a.phase != phase:
            phase = a.phase
            monitor.phase(phase)
        blocks[a.born] = cuda.malloc(a.nbytes)
        if "convolution" in a.operation:
            cuda.free(cuda.malloc(3 * MIB + 1))
    if leak_bytes:
        cuda.malloc(leak_bytes)
    monitor.checkpoint("end")
    device, versions = about_machine(CPU)
    measured = Measurement(
        settings="", accumulation=accumulation, engine="torch", device=device, versions=versions,
        seconds=(2.0, 0.5, 0.25), host_bytes=(MIB, 2 * MIB, 2 * MIB), statistics=monitor.statistics(),
        workspaces=(Workspaces("c", 3 * MIB + 1, 0, None),),
    )  # fmt: skip
    return monitor.recording("nano", profile.plan, ""), measured


@cache
def on_card(leak_bytes: int = 0) -> Outcome:
    profile = nano(total_batch=2, cap_bytes=CAP_BYTES, offload_optimizer=True)
    recording, measured = played(profile, leak_bytes=leak_bytes)
    job = Job(name="nano", profile=profile, device="cuda")
    return Outcome(
        job=job, status="ok", ended=Ended(0, "step 3", ()), measured=measured, recording=recording, resolved=profile
    )
