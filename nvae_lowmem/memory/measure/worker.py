"""The measured process: sets training up as `launch/train.py` does, runs a few steps, and writes what it saw.

    python -m nvae_lowmem.memory.measure.worker FOLDER

FOLDER holds profile.toml and job.json (device, steps, name); result.json, decided.toml (the profile with everything
decided) and the recording's two files are added. A process of its own, because a driver that fails, or a kernel that
kills what takes too much memory, takes the whole process along. Lines on standard output that begin with "@" say what
it is at.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import EngineName, Profile
from nvae_lowmem.data.labels import label_rows
from nvae_lowmem.data.pipeline import MicroBatch, to_network
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.hardware.gpu_facts import GpuFacts, read_gpu
from nvae_lowmem.memory.allocator.allocator import AllocatorSettings, CachingAllocator
from nvae_lowmem.memory.allocator.recording import Recording, save_recordings
from nvae_lowmem.memory.allocator.settings import UNLIMITED_BYTES
from nvae_lowmem.memory.measure.convolutions import Convolution, ConvolutionRecorder, workspaces
from nvae_lowmem.memory.measure.cuda import CudaMonitor
from nvae_lowmem.memory.measure.measurement import (
    DeviceFacts,
    Measurement,
    StepMeasurements,
    measurement_to_json,
    traced_recording,
)
from nvae_lowmem.memory.predict.figures import MemoryFigures
from nvae_lowmem.memory.predict.untraced import entries, overlaid, untraced_host_bytes
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.training.build import build_model, build_training, engine_factory
from nvae_lowmem.training.divergence import Diverged
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.engines.engine import Engine
from nvae_lowmem.training.out_of_memory import is_out_of_memory
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run
from nvae_lowmem.training.step import Training, training_step

JOB, PROFILE, DECIDED, RESULT = "job.json", "profile.toml", "decided.toml", "result.json"
STAGE = "@"
_EPOCH_STEPS = 100  # of the data set that is not there: the schedule wants to know


class MemoryMonitor(Protocol):
    """What the steps tell whoever records the allocator."""

    def phase(self, name: str) -> None:
        """A phase begins: requests from now on belong to it."""
        ...

    def checkpoint(self, name: str) -> None:
        """Note the allocator's figures."""
        ...

    def note_free(self, name: str) -> None:
        """Note what is free on the card."""
        ...

    def now(self) -> float:
        """Seconds, read when the device has finished all work that it was given."""
        ...


class ClockOnly:
    """The monitor where there is no CUDA allocator."""

    def phase(self, name: str) -> None:
        """Do nothing."""

    checkpoint = note_free = phase

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()


class PhasedEngine:
    """An engine that tells the monitor which phase of the step begins; all else is the engine's own."""

    def __init__(self, engine: Engine, monitor: MemoryMonitor) -> None:
        self._engine, self._monitor = engine, monitor

    def forward(self, *args: Any) -> Any:
        """The engine's own, in phase forward."""
        self._monitor.phase("forward")
        return self._engine.forward(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        """The engine's own, in phase backward."""
        self._monitor.phase("backward")
        self._engine.backward(loss, last)

    def update(self) -> Any:
        """The engine's own, in phase update."""
        self._monitor.phase("update")
        return self._engine.update()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job in the folder; returns 0 when result.json tells how it went, 2 for what the user has to change."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    profile = profiles.load(folder / PROFILE)
    try:
        measurement = _measure(folder, job, profile)
    except (ConfigError, Diverged) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
    (folder / RESULT).write_bytes(measurement_to_json(measurement))
    return 0


def _measure(folder: Path, job: dict[str, Any], profile: Profile) -> Measurement:
    cuda_memory.prepare_environment(profile.plan)
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF", "")
    AllocatorSettings.from_string(settings)  # what cannot be simulated need not be recorded
    device = torch.device("cuda", 0) if job["device"] == "cuda" else torch.device("cpu")
    engine_name, reason = distributed.choose_engine(profile.plan, False, device)
    if device.type == "cpu":
        if engine_name == "deepspeed":
            raise ConfigError(
                "--device cpu watches the torch engine's allocations only, and this plan runs DeepSpeed: measure it on "
                "a card, or --set plan.engine=torch"
            )
        keep_freed_memory()
    cuda = None
    if device.type == "cuda":
        _say("the CUDA context")
        cuda = CudaMonitor(device)
    if engine_name == "deepspeed":
        device = distributed.initialise(device)[2]
    run = measured_run(profile, device, engine_name)
    profiles.save(run.profile, folder / DECIDED)
    cuda_memory.apply_memory_cap(run.profile.plan, device)
    name, steps = job["name"], job["steps"]
    measured, training = _run(run, engine_name, device, cuda or ClockOnly(), steps)
    machine, versions = about_machine(device)
    measurement = Measurement(
        **vars(measured), engine=reason, settings=settings, accumulation=run.split.accumulation,
        device=machine, versions=versions,
    )  # fmt: skip
    if cuda is None:
        recording, peaks = _recorded_on_cpu(name, run, steps, settings)
        measurement = replace(measurement, peaks=peaks)
    else:
        measurement = replace(measurement, statistics=cuda.statistics())
        recording = cuda.recording(name, run.profile.plan, settings)
        cuda.close()
        if training is not None:
            found = _convolutions(training, steps)
            del training
            measurement = replace(measurement, workspaces=workspaces(found, device, cuda.extra_bytes))
    save_recordings(folder, [recording])
    return measurement


def measured_run(profile: Profile, device: torch.device, engine_name: EngineName) -> ResolvedRun:
    """The run whose steps are measured, at a rate at which weights hardly move: noise is no data to learn from."""
    run = resolve_run(profile, profile.training.total_batch * _EPOCH_STEPS, device, 1)
    decided = run.profile.with_plan(engine=engine_name)
    return replace(
        run, profile=decided, schedule=run.schedule._replace(warmup_steps=0, peak_rate=run.schedule.peak_rate / 1000)
    )


def _run(
    run: ResolvedRun, engine_name: EngineName, device: torch.device, monitor: MemoryMonitor, steps: int
) -> tuple[StepMeasurements, Training | None]:
    """Set-up and steps: what each step took, and the training; None for it where memory ran out."""
    before = psutil.Process().memory_info().rss
    at = "the set-up"
    seconds: list[float] = []
    host_bytes: list[int] = []
    overflows = 0
    try:
        monitor.phase("setup")
        _say(at)
        training = _set_up(run, engine_name, device)
        watched = replace(training, engine=PhasedEngine(training.engine, monitor))  # type: ignore[arg-type]
        monitor.checkpoint("setup done")
        for step in range(steps):
            at = f"step {step + 1}"
            _say(at)
            began = monitor.now()
            done = training_step(watched, _synthetic(run, device, step, monitor), step)
            seconds.append(monitor.now() - began)
            host_bytes.append(psutil.Process().memory_info().rss - before)
            overflows += bool(done.update.overflow)
            del done
            monitor.checkpoint(at)
            monitor.note_free(at)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        detail = f"in {at}: {str(error).splitlines()[0]}"
        return _steps("out of memory", detail, seconds, host_bytes, overflows), None
    return _steps("ok", "", seconds, host_bytes, overflows), training


def _steps(
    status: Literal["ok", "out of memory"], detail: str, seconds: list[float], host_bytes: list[int], overflows: int
) -> StepMeasurements:
    return StepMeasurements(
        status=status, detail=detail, seconds=tuple(seconds), host_bytes=tuple(host_bytes), overflows=overflows
    )


def _convolutions(training: Training, step: int) -> list[Convolution]:
    """The distinct convolutions of a step, which is run for them."""
    _say("the convolutions of one more step, and their workspaces")
    with ConvolutionRecorder() as recorder:
        training_step(training, _synthetic(training.run, training.engine.device, step), step)
    return list(recorder.found)


def _set_up(run: ResolvedRun, engine_name: EngineName, device: torch.device) -> Training:
    """Build what training builds, in its order."""
    model = build_model(run.profile)

    def images(step: int) -> Tensor:
        return synthetic_images(run.profile.model, step, 0, run.split.micro, device)

    return build_training(run, model, device, engine_factory(engine_name), images)


def _synthetic(
    run: ResolvedRun, device: torch.device, step: int, monitor: MemoryMonitor | None = None
) -> Iterator[MicroBatch]:
    """The micro-batches of a step, made when they are asked for; they belong to the forward pass."""
    for slots in run.split.slots(rank=0):
        if monitor is not None:
            monitor.phase("forward")
        # without names here, which would keep images and labels alive
        yield MicroBatch(
            slots.start,
            synthetic_images(run.profile.model, step, slots.start, run.split.micro, device),
            synthetic_labels(run.profile.model, slots.start, run.split.micro, device),
        )


def synthetic_images(model: ModelConfig, step: int, slot: int, count: int, device: torch.device) -> Tensor:
    """Noise of the model's kind (count, C, T, T), made on the host and sent to the device as training's images are."""
    generator = torch.Generator().manual_seed(step * 1_000_003 + slot)
    size = model.image_size
    pixels = torch.randint(0, 256, (count, model.image_channels, size, size), dtype=torch.uint8, generator=generator)
    return to_network(pixels, model, None).to(device, non_blocking=True)


def synthetic_labels(model: ModelConfig, slot: int, count: int, device: torch.device) -> Tensor | None:
    """Labels that take turns, as training's are made and sent; None where the model has no classes."""
    if not model.classes:
        return None
    return label_rows(np.arange(slot, slot + count) % model.classes, model.classes).to(device, non_blocking=True)


def _recorded_on_cpu(name: str, run: ResolvedRun, steps: int, settings: str) -> tuple[Recording, MemoryFigures]:
    """The same steps on CPU tensors once more, every storage recorded; peaks by way of the simulated allocator."""
    _say("the same steps, recorded")
    profile, accumulation = run.profile, run.split.accumulation
    trace = trace_training(profile, run.split.micro, accumulation, steps, fake=False)
    overlay = entries(profile, trace, accumulation)
    held = [e for e in overlay if e.is_replayed and not e.is_bound]
    allocator = CachingAllocator(AllocatorSettings.from_string(settings), UNLIMITED_BYTES >> 1)
    stats = allocator.replay(overlaid(trace, held).requests()).checkpoints[-1]
    peaks = MemoryFigures(
        allocated_peak_bytes=stats.peak_allocated_bytes,
        reserved_peak_bytes=stats.peak_reserved_bytes,
        host_bytes=trace.host_bytes() + untraced_host_bytes(overlay),
    )
    return traced_recording(name, trace, settings), peaks


def about_machine(device: torch.device) -> tuple[DeviceFacts, dict[str, str | int | None]]:
    """The device and the versions, as far as there are any."""
    gpu = read_gpu() if device.type == "cuda" else GpuFacts()  # reading makes a CUDA context
    seen = gpu.card
    facts = DeviceFacts(device.type)
    if seen is not None:
        facts = DeviceFacts(seen.name, "{}.{}".format(*seen.compute_capability), seen.total_bytes("linux"))
    return facts, {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "driver": gpu.driver,
        "platform": sys.platform,
    }


def _say(stage: str) -> None:
    print(STAGE + stage, flush=True)


if __name__ == "__main__":
    sys.exit(main())
