"""Work without gradients, traced as training is: sampling, evaluation and pictures, in a process of their own or in one
that trains. The functions that run are those that the commands and the trainer run, with more than one pass each, so
that memory which one pass leaves behind shows in the next.

A tensor on device "cpu" stands for the card here, as in `trace`. These functions also move images there and results
back, which on the CPU moves nothing: `HostAndCard` makes the copies that a card would have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nvae_lowmem.config.choices import BlendMode
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import MicroBatch, without_padding
from nvae_lowmem.evaluation.anomaly import anomaly_figures, coarse_latents
from nvae_lowmem.evaluation.bounds import elbo_of_images, importance_weighted_bound
from nvae_lowmem.evaluation.distances import Comparison, RandomConvFeatures
from nvae_lowmem.generation.blend import blend_images, path_weights
from nvae_lowmem.generation.grids import preview
from nvae_lowmem.generation.recalibrate import recalibrate
from nvae_lowmem.generation.reconstruct import parse_first_groups, reconstruct
from nvae_lowmem.generation.restore import restore
from nvae_lowmem.generation.sample import reconstruct_images, sample_chunks
from nvae_lowmem.generation.traverse import Move, channel_kl, traverse
from nvae_lowmem.memory.trace.events import Category, Peak, Phase, Trace
from nvae_lowmem.memory.trace.storageless import StoragelessTensors
from nvae_lowmem.memory.trace.tracer import StorageTracer, attach_tracer, paused_gc
from nvae_lowmem.memory.trace.training import complete_trace, traced_engines
from nvae_lowmem.model.functional import as_on_card
from nvae_lowmem.model.host import host_memory
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.build import build_training, prepare_for_inference
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.open_run import images_per_pass
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step
from nvae_lowmem.training.validation import validate

Work = Literal[
    "sampling", "recalibration", "evaluation", "bound", "reconstruction", "blending", "traversal", "restoration",
    "anomalies", "validation", "pictures", "between steps",
]  # fmt: skip
"""between steps: validation, then pictures, as the trainer does them; a checkpoint takes nothing of the card."""
WORKS: tuple[Work, ...] = get_args(Work)[:-1]
_CARD = torch.device("cpu")
_HELD_OUT_IMAGES = 8
"""Images that the trainer hands to its pictures."""


def generation_peaks(profile: Profile, micro_batch: int) -> dict[str, Peak]:
    """The peak of every kind of work without gradients, under the profile's plan at this micro-batch.

    validation and pictures happen in the process that trains, the others in one that only has the weights, in fp32.
    The plan's precision must be decided.
    """
    return {work: trace_generation(profile, work, micro_batch).peak() for work in WORKS}


def trace_generation(profile: Profile, work: Work, micro_batch: int, draws: int = 0, fake: bool = True) -> Trace:
    """Trace work without gradients under the profile's plan at `micro_batch`; the precision must be decided.

    draws: k of the importance-weighted bound; 0: as many as fill two passes, which all later ones equal.
    With `fake` nothing is computed and nothing of the model's size is allocated; without it the same work really runs
    on the CPU, for comparison.
    """
    plan = replace(profile.plan, micro_batch=micro_batch)
    profile = replace(profile, plan=plan, training=replace(profile.training, total_batch=micro_batch))
    images = images_per_pass(profile)
    modes: tuple[BlendMode, ...] = ("linear", "simple")
    # made before the tracer comes: these are numbers, which the work looks at
    weights = {mode: path_weights(profile.model, mode, "1", "", 2 * images + 2) for mode in modes}
    tracer = StorageTracer(StoragelessTensors() if fake else None)
    with paused_gc(), as_on_card(), tracer:
        task = _Task(profile, tracer, images, draws or 2 * images, weights)
        do, stand = _WORKS[work]
        with stand(task) as model:
            tracer.phase, tracer.block = Phase.EVALUATION, ""
            tracer.mark("setup done")
            with HostAndCard(tracer):
                do(task, model)
            tracer.mark("end")
            trace = tracer.close()
    return complete_trace(trace, model, micro_batch)


class HostAndCard(TorchFunctionMode):
    """Lets tensors go between host and card where both are the CPU.

    `.cpu()` copies to the host and `.to(device)` to the card. What is computed of tensors of the host alone lies on the
    host. A list made of a tensor without memory is all ones.
    """

    def __init__(self, tracer: StorageTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cpu:
            with host_memory():
                return args[0].clone()
        if func is Tensor.tolist and args[0].data_ptr() == 0:
            return np.ones(tuple(args[0].shape)).tolist()
        tensors = list(_tensors(args))
        if not tensors or any(self._tracer.is_on_card(t) for t in tensors):
            return func(*args, **kwargs)
        if func is Tensor.to and any(isinstance(a, torch.device) for a in (*args, *kwargs.values())):
            out = func(*args, **kwargs)
            return out.clone() if out.untyped_storage()._cdata == args[0].untyped_storage()._cdata else out
        with host_memory():
            return func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


# --- who does it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What work is done with."""

    profile: Profile
    tracer: StorageTracer
    images: int
    """Images per pass of a command."""
    draws: int
    weights: dict[BlendMode, Tensor]
    """Of blends, (P, groups)."""

    def on_host(self, count: int) -> Tensor:
        """(count, C, padded, padded)."""
        c = self.profile.model
        with host_memory():
            return torch.rand(count, c.image_channels, c.network_size, c.network_size)

    def batches(self, count: int) -> Iterator[Tensor]:
        """Two batches of images on the card."""
        for _ in range(2):
            self.tracer.block = "data"
            x = self.on_host(count).to(_CARD)
            self.tracer.set_category(x, Category.DATA)
            yield x


@contextlib.contextmanager
def _command(task: _Task) -> Iterator[NVAE]:
    """The model as a command opens it."""
    model = prepare_for_inference(NVAE(task.profile.model), task.profile)
    attach_tracer(model, task.tracer)
    yield model


@contextlib.contextmanager
def _lent(task: _Task) -> Iterator[NVAE]:
    """The model as the trainer lends it, without an engine, whose memory does not change this work."""
    model = NVAE(task.profile.model).train()
    apply_plan(model, task.profile.plan)
    attach_tracer(model, task.tracer)
    yield model


@contextlib.contextmanager
def _trainer(task: _Task) -> Iterator[NVAE]:
    """The model as the trainer lends it between two steps: with its averaged weights, everything else in place."""
    profile, model = task.profile, NVAE(task.profile.model)
    run = run_without_data(profile, profile.plan.micro_batch)
    training = build_training(run, model, _CARD, traced_engines(task.tracer))
    if not profile.plan.offload_optimizer:  # the optimiser's states come with the first step
        c = profile.model
        alone = replace(training, run=run_without_data(profile, 1), ema=None)
        image = torch.rand(1, c.image_channels, c.network_size, c.network_size)
        training_step(alone, iter([MicroBatch(0, image)]), 1)
        del image
    with training.ema.applied_to(model) if training.ema is not None else contextlib.nullcontext():
        yield model


# --- what is done -----------------------------------------------------------------------------------------------------


def _sampling(task: _Task, model: NVAE) -> None:
    for drawn in (False, True):
        for _ in sample_chunks(model, 2 * task.images, 0.7, 0, task.images, likelihood_sample=drawn):
            pass
    if model.config.classes:
        for _ in sample_chunks(model, 2 * task.images, 0.7, 0, task.images, guidance=2.0):
            pass


def _recalibration(task: _Task, model: NVAE) -> None:
    recalibrate(model, 0.7, 2, task.images, 0)


def _evaluation(task: _Task, model: NVAE) -> None:
    comparison = Comparison(RandomConvFeatures(), _CARD)
    for x in task.batches(task.images):
        elbo_of_images(model, x, 0)
        comparison.add_real(without_padding(x, model.config))


def _bound(task: _Task, model: NVAE) -> None:
    x = next(task.batches(task.images))
    together = max(1, task.images // task.draws)
    importance_weighted_bound(model, x[: 2 * together], task.draws, 0, task.images)


def _reconstruction(task: _Task, model: NVAE) -> None:
    images = task.on_host(2 * task.images)
    reconstruct(model, images, 0, task.images, first_groups=parse_first_groups("auto", model.config))
    reconstruct_images(model, images, 0, task.images)


def _blending(task: _Task, model: NVAE) -> None:
    for mode, weights in task.weights.items():
        blend_images(model, task.on_host(2), weights, mode, micro_batch=task.images)


def _traversal(task: _Task, model: NVAE) -> None:
    channel_kl(model, (task.on_host(task.images) for _ in range(2)), 0)
    moves = [Move(0, None, 0.0), *(Move(model.config.total_groups - 1, (0,), 1.0) for _ in range(2 * task.images - 1))]
    traverse(model, task.on_host(1), moves, micro_batch=task.images)


@dataclass(frozen=True)
class _NothingKnown:
    """Pixels that are all missing, (B, C, S, S): what is known of an image lies on the host and changes nothing."""

    images: Tensor
    imputes: ClassVar[bool] = True

    def first_guess(self) -> Tensor:
        return self.images

    def shown(self) -> Tensor:
        return self.images

    def put_in(self, images: Tensor) -> Tensor:
        return images

    def result(self, mean: Tensor) -> Tensor:
        return mean


def _restoration(task: _Task, model: NVAE) -> None:
    known = _NothingKnown(without_padding(task.on_host(2 * task.images), model.config))
    restore(model, known, iterations=2, micro_batch=task.images, guesses=2)


def _anomalies(task: _Task, model: NVAE) -> None:
    coarse_latents(model, (task.on_host(task.images) for _ in range(2)))
    later = max(1, model.config.total_groups // 2)
    anomaly_figures(model, task.on_host(2 * task.images), later, draws=2, micro_batch=task.images)


def _validation(task: _Task, model: NVAE) -> None:
    plan = task.profile.plan
    validate(model, task.batches(plan.micro_batch), 0, plan.precision)


def _between_steps(task: _Task, model: NVAE) -> None:
    training = task.profile.training
    average = None
    if training.ema_decay:
        with host_memory():  # wherever it lies, it is no part of this work
            where = "cpu" if training.ema_on_host else None
            average = WeightEma(NVAE(task.profile.model), training.ema_decay, where)
    for work in (_validation, _pictures):
        with average.applied_to(model) if average is not None else contextlib.nullcontext():
            work(task, model)
    model.train()


def _pictures(task: _Task, model: NVAE) -> None:
    preview(model.eval(), next(task.batches(_HELD_OUT_IMAGES)), task.profile, (0.7, 0.8), passes=2)


_WORKS: dict[Work, tuple[Callable[[_Task, NVAE], None], Callable[[_Task], contextlib.AbstractContextManager[NVAE]]]] = {
    "sampling": (_sampling, _command),
    "recalibration": (_recalibration, _command),
    "evaluation": (_evaluation, _command),
    "bound": (_bound, _command),
    "reconstruction": (_reconstruction, _command),
    "blending": (_blending, _command),
    "traversal": (_traversal, _command),
    "restoration": (_restoration, _command),
    "anomalies": (_anomalies, _command),
    "between steps": (_between_steps, _lent),
    "validation": (_validation, _trainer),
    "pictures": (_pictures, _trainer),
}
