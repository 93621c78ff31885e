"""The step that trains, traced: on tensors without storage, or on real ones on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.memory.trace.events import Category, Phase, Trace, categorise_by_lifetime
from nvae_lowmem.memory.trace.storageless import StoragelessTensors
from nvae_lowmem.memory.trace.tracer import StorageTracer, attach_tracer, paused_gc
from nvae_lowmem.model.blocks import Head
from nvae_lowmem.model.functional import as_on_card
from nvae_lowmem.model.host import host_memory
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import Objective
from nvae_lowmem.model.regularizers import regularisation_values
from nvae_lowmem.training.build import EngineFactory, build_training
from nvae_lowmem.training.engines.torch_engine import TorchEngine
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step


class AbsentAdamax(torch.optim.Adamax):
    """Stands in for the host's optimiser, whose update takes no memory of the card."""

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


class TracedEngine(TorchEngine):
    """The torch engine, which tells the tracer its phases."""

    tracer: StorageTracer
    offloaded = False

    def forward(self, *args: Any) -> Any:
        """One micro-batch, with one power iteration in place of all: each frees its memory before the next begins."""
        self.tracer.phase = Phase.FORWARD
        self.tracer.pass_number += 1
        settings = self.model.settings
        settings.iterations = min(settings.iterations, 1)
        return super().forward(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.tracer.phase = Phase.BACKWARD
        super().backward(loss, last)

    def update(self) -> Any:
        """The update. All that an offloaded optimiser makes is host memory, like the weights that it updates."""
        self.tracer.phase, self.tracer.block = Phase.UPDATE, "optimizer"
        self.tracer.category = Category.HOST if self.offloaded else Category.OPTIMIZER_STATE
        try:
            return super().update()
        finally:
            self.tracer.category = None


def trace_training(
    profile: Profile, micro_batch: int, accumulation: int = 1, steps: int = 2, fake: bool = True
) -> Trace:
    """Trace `steps` optimiser steps of the profile's model and plan at `micro_batch`; precision must be decided.

    With `fake` nothing is computed and nothing of the model's size is allocated; without it the same step really runs
    on the CPU, for comparison. The model is built on the host and moved to the card: of the set-up only what stays is
    in the trace.
    """
    tracer = StorageTracer(StoragelessTensors() if fake else None)
    if profile.training.ema_on_host:  # nothing of it is on the card; `untraced` has its bytes
        profile = replace(profile, training=replace(profile.training, ema_decay=0.0))
    run = run_without_data(profile, micro_batch, accumulation)
    with paused_gc(), as_on_card(), tracer:
        training = build_training(run, _moved(profile), torch.device("cpu"), traced_engines(tracer))
        if training.ema is not None:
            for tensor in [*training.ema.module.parameters(), *training.ema.module.buffers()]:
                tracer.set_category(tensor, Category.BUFFER)
        figures = _as_data(_figures(profile), tracer)
        tracer.mark("setup done")
        micro_batches = _traced_images(profile, micro_batch, tracer)
        for step in range(1, steps + 1):
            tracer.mark(f"step {step}")
            figures = _as_data(
                training_step(training, micro_batches, step)[:5], tracer
            )  # the step before's live so far
            regularisation_values(training.engine.model)  # for the log
        tracer.mark("end")
        trace = tracer.close()
    del figures
    return complete_trace(trace, training.engine.model, micro_batch)


def _moved(profile: Profile) -> NVAE:
    """The model, built on the host, and every tensor of it made on the card in the order of `model.to`."""
    with host_memory():
        model = NVAE(profile.model)
    return model._apply(torch.clone)


def _figures(profile: Profile) -> list[Tensor]:
    """What a step before the first would have left: the tensors of a StepResult, which live until the next is made.

    So the first step is like the later ones; without them it would take some blocks of 512 bytes less.
    """
    groups = profile.model.total_groups
    return [torch.empty(shape) for shape in ((), (), (groups,), (groups,), (groups,))]


def _as_data(tensors: Sequence[Tensor], tracer: StorageTracer) -> Sequence[Tensor]:
    """The tensors, which are recorded as data."""
    for tensor in tensors:
        tracer.set_category(tensor, Category.DATA)
    return tensors


def _traced_images(profile: Profile, micro_batch: int, tracer: StorageTracer) -> Iterator[MicroBatch]:
    """Micro-batches without end, made on the card when they are asked for."""
    size = profile.model.network_size

    def images() -> Tensor:
        tracer.phase, tracer.block = Phase.FORWARD, "data"
        x = torch.rand(micro_batch, profile.model.image_channels, size, size)
        tracer.set_category(x, Category.DATA)
        return x

    def labels() -> Tensor | None:
        if not profile.model.classes:
            return None
        rows = torch.rand(micro_batch, profile.model.classes + 1)
        tracer.set_category(rows, Category.DATA)
        return rows

    while True:
        yield MicroBatch(0, images(), labels())  # without names here, which would keep them alive


def complete_trace(trace: Trace, model: NVAE, micro_batch: int) -> Trace:
    """The trace with every allocation categorised, its model's sizes, and of the set-up only what stays."""
    categorise_by_lifetime(trace)
    trace.micro_batch = micro_batch
    trace.parameter_bytes = tuple(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
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
