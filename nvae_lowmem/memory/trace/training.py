"""The step that trains, traced: on tensors without storage, or on real ones on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.memory.trace.events import Trace, categorise_by_lifetime
from nvae_lowmem.memory.trace.storageless import StoragelessTensors
from nvae_lowmem.memory.trace.tracer import StorageTracer, attach_tracer, paused_gc
from nvae_lowmem.model.blocks import Head
from nvae_lowmem.model.functional import as_on_card
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.training.build import EngineFactory, build_training
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step


class AbsentAdamax(torch.optim.Adamax):
    """In place of the update that the host makes of its own weights, which takes nothing of the card."""

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


class TracedEngine(TorchEngine):
    """The torch engine, which tells the tracer its phases."""

    tracer: StorageTracer
    offloaded = False

    def forward(self, *args: Any) -> Any:
        """One micro-batch, with one power iteration in place of all: each frees its memory before the next begins."""
        self.tracer.phase = "forward"
        self.tracer.pass_number += 1
        settings = self.model.settings
        settings.iterations = min(settings.iterations, 1)
        return super().forward(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.tracer.phase = "backward"
        super().backward(loss, last)

    def update(self) -> Any:
        """The update; of an offloaded optimiser everything is host memory, as the weights are that it works on."""
        self.tracer.phase, self.tracer.block = "update", "optimizer"
        self.tracer.category = "host" if self.offloaded else "optimizer state"
        try:
            return super().update()
        finally:
            self.tracer.category = ""


def trace_training(
    profile: Profile, micro_batch: int, accumulation: int = 1, steps: int = 2, fake: bool = True
) -> Trace:
    """Trace `steps` optimiser steps of the profile's model and plan at `micro_batch`; precision must be decided.

    With `fake` nothing is computed and nothing of the model's size is allocated; without it the same step really runs
    on the CPU, for comparison. The model is built elsewhere and moved to the card: of the set-up only what stays is
    in the trace.
    """
    tracer = StorageTracer(StoragelessTensors() if fake else None)
    without_average = replace(profile, training=replace(profile.training, ema_decay=0.0))  # `untraced` has its bytes
    run = run_without_data(without_average, micro_batch, accumulation)
    with paused_gc(), as_on_card(), tracer:
        training = build_training(run, NVAE(profile.model), torch.device("cpu"), traced_engines(tracer))
        tracer.mark("setup done")
        micro_batches = _traced_images(profile, micro_batch, tracer)
        for step in range(1, steps + 1):
            tracer.mark(f"step {step}")
            training_step(training, micro_batches, step)
        tracer.mark("end")
        trace = tracer.close()
    return complete_trace(trace, training.engine.model, micro_batch)


def _traced_images(profile: Profile, micro_batch: int, tracer: StorageTracer) -> Iterator[MicroBatch]:
    """Micro-batches without end, made on the card when they are asked for."""
    size = profile.model.network_size

    def images() -> Tensor:
        tracer.phase, tracer.block = "forward", "data"
        x = torch.rand(micro_batch, profile.model.image_channels, size, size)
        tracer.set_category(x, "data")
        return x

    while True:
        yield MicroBatch(0, images())  # without a name here, which would keep the images alive


def complete_trace(trace: Trace, model: NVAE, micro_batch: int) -> Trace:
    """The trace with every allocation categorised, its model's sizes, and of the set-up only what stays."""
    categorise_by_lifetime(trace)
    trace.micro_batch = micro_batch
    trace.parameter_bytes = tuple(p.numel() * p.element_size() for p in model.parameters())
    trace.chunk_images = _images_per_chunk(model)
    return trace.without_temporaries(trace.marks["setup done"])


def traced_engines(tracer: StorageTracer) -> EngineFactory:
    """Makes the engine that trains a model, with the tracer attached to both."""

    def make(objective: Objective, profile: Profile, device: torch.device, accumulation: int) -> TracedEngine:
        attach_tracer(objective.model, tracer)
        # on the card an optimiser's temporaries count; on the host nobody needs to compute for the card's sake
        offloaded = profile.plan.offload_optimizer
        optimizer = AbsentAdamax if offloaded else functools.partial(torch.optim.Adamax, foreach=False)
        engine = TracedEngine(objective, profile, device, accumulation, optimizer)
        engine.tracer, engine.offloaded = tracer, offloaded
        return engine

    return make


def _images_per_chunk(model: NVAE) -> int:
    """Images that share a chunk of the likelihood, whatever the batch (see `negative_log_likelihood`)."""
    head = model.blocks["head"]
    assert isinstance(head, Head)
    image_bytes = head.likelihood.working_values_per_pixel * model.config.image_size**2 * 4
    return max(1, min(head.chunk_images, head.chunk_bytes // image_bytes))
