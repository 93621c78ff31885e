"""The loop: steps, log lines, evaluations, pictures, checkpoints, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.data.pipeline import Batches, MicroBatch, evaluation_batches, prefetched
from nvae_lowmem.data.sources import Datasets
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.regularizers import regularisation_values
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.divergence import DivergenceGuard
from nvae_lowmem.training.engines.distributed import average_statistics
from nvae_lowmem.training.monitor import Monitor, is_early
from nvae_lowmem.training.step import StepResult, Training, training_step
from nvae_lowmem.training.validation import Validation, validate
from nvae_lowmem.units import GIB

Pictures = Callable[[NVAE, Tensor, Path, int], dict[str, np.ndarray]]
"""(model in evaluation mode, held-out images, samples folder, step) -> pictures by TensorBoard name."""


class Trainer:
    """Trains from `first_step` (finished steps) to the end of the run, or until asked to stop."""

    def __init__(
        self,
        training: Training,
        data: Datasets,
        run_dir: Path | None,
        pictures: Pictures | None = None,
        first_step: int = 0,
    ) -> None:
        self.training, self.data, self.run_dir = training, data, run_dir
        self.run, self.engine, self.ema = training.run, training.engine, training.ema
        self.pictures, self.first_step = pictures, first_step
        self.profile, self.schedule = self.run.profile, self.run.schedule
        self._batches = Batches(
            data.train,
            self.profile.model,
            self.profile.data,
            self.profile.training.total_batch,
            self.profile.training.seed,
        )
        self._stop_requested = False
        self._guard = DivergenceGuard(self.profile.plan.precision)
        self._saved_step = first_step if first_step else -1  # what training went on from is saved already
        self.last_validation: Validation | None = None
        self._evaluated_step = -1

    def train(self) -> int:
        """Train; returns the number of finished steps. Raises Diverged where more steps would be for nothing."""
        training, total = self.profile.training, self.schedule.total_steps
        evaluate_every, sample_every, save_every = (
            every or max(1, total // 10)
            for every in (training.evaluate_every, training.sample_every, training.save_every)
        )
        step = self.first_step
        with (
            contextlib.closing(self._micro_batches(step, total)) as micro_batches,
            Monitor(self.run_dir if self.engine.rank == 0 else None, total, self.first_step) as monitor,
            self._signals(monitor),
        ):
            while step < total and not self._stop_requested:
                began = time.monotonic()
                result = training_step(self.training, micro_batches, step)
                step += 1
                self._guard.check(result.update, step)
                self._report(monitor, result, step, time.monotonic() - began)
                last = step == total
                if last or step % evaluate_every == 0:
                    self._evaluate(monitor, step)
                if last or step % sample_every == 0:
                    self._draw(monitor, step)
                if last or step % save_every == 0:
                    self._save(monitor, step)
            if self._stop_requested and step < total:
                self._save(monitor, step)
                monitor.say(f"stopped after step {step}; the same command with --run-dir {self.run_dir} goes on")
        return step

    # -- pieces of a step --

    def _micro_batches(self, step: int, total: int) -> Generator[MicroBatch, None, None]:
        """This process' micro-batches on its device, in the order in which `training_step` asks for them."""
        slots, device = self.run.split.slots(self.engine.rank), self.engine.device
        on_card = device.type == "cuda"
        with contextlib.closing(prefetched(self._batches, step, total, slots, pin_memory=on_card)) as ready:
            for slot, x in ready:
                yield MicroBatch(slot, x.to(device, non_blocking=True))

    def _report(self, monitor: Monitor, r: StepResult, step: int, seconds: float) -> None:
        early = is_early(step, self.profile.training.log_every)
        batch = self.profile.training.total_batch
        line = (
            f"nelbo {float(r.nll + r.kl.sum()):.1f}  recon {float(r.nll):.1f}  kl {float(r.kl.sum()):.1f}  "
            f"{batch / seconds:.1f} images/s"
        )
        memory = cuda_memory.torch_memory(self.engine.device)
        if memory:
            line += f"  peak {memory['memory/peak_allocated_gib']:.2f} GiB"
        if self._guard.overflows:
            line += f"  overflows {self._guard.overflows}"
        monitor.progress(step, line, early)
        predicted = int(self.profile.provenance.get("predicted_allocated_bytes", 0))
        if step - self.first_step == 3:  # the optimiser's states exist, the caches are warm
            margin = int(self.profile.provenance.get("margin_bytes", 0))
            text = cuda_memory.predicted_vs_measured(predicted, margin, self.engine.device)
            if text:
                monitor.say(text)
        if not early:
            return
        with self.engine.gathered():
            spectral, batch_norm = (float(v) for v in regularisation_values(self.engine.model))
        values = {
            "train/nelbo_iter": float(r.nll + r.kl.sum()),
            "train/recon_iter": float(r.nll),
            "train/kl_iter": float(r.kl.sum()),
            "train/loss": float(r.loss),
            "train/lr": r.learning_rate,
            "train/norm_loss": spectral,
            "train/bn_loss": batch_norm,
            "train/wdn_coeff": r.regulariser,
            "train/loss_scale": self.engine.loss_scale,
            "train/overflows": float(self._guard.overflows),
            "kl_coeff/coeff": r.beta,
            "timing/sec_per_step": seconds,
            "timing/images_per_sec": batch / seconds,
        }
        groups = zip(r.kl.tolist(), r.active.tolist(), r.coefficients.tolist(), strict=True)
        for i, (kl, active, coefficient) in enumerate(groups):
            values |= {f"kl_vals/layer_{i}": kl, f"kl/active_{i}": active, f"kl_coeff/layer_{i}": coefficient}
        if predicted:
            values["memory/predicted_gib"] = predicted / GIB
        monitor.scalars(step, values | memory | cuda_memory.nvml_memory(self.engine.device))

    def _held_out(self, count: int, batch: int) -> Iterator[Tensor]:
        profile = self.profile
        seen = 0
        for x in evaluation_batches(self.data.test, profile.model, profile.data, batch, profile.training.seed):
            if count and seen >= count:
                return
            yield (x[: count - seen] if count else x).to(self.engine.device)
            seen += len(x)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the model is whole, has its averaged weights, and the BatchNorm statistics of all processes."""
        with self.engine.gathered():
            if self.engine.world_size > 1:
                average_statistics(self.engine.model)
            with self.ema.applied_to(self.engine.model) if self.ema is not None else contextlib.nullcontext():
                yield

    def _evaluate(self, monitor: Monitor, step: int) -> None:
        training = self.profile.training
        with self._averaged_weights():
            v = validate(
                self.engine.model,
                self._held_out(training.evaluate_images, self.run.split.micro),
                training.seed,
                self.profile.plan.precision,
            )
        self.last_validation, self._evaluated_step = v, step
        monitor.say(
            f"step {step}: held-out -ELBO {v.nelbo:.2f} nats = {v.bits_per_dim:.3f} bits/dim "
            f"(recon {v.nll:.2f}, kl {sum(v.kl):.2f}) on {v.images} images"
        )
        values = {"val/nelbo": v.nelbo, "val/recon": v.nll, "val/kl": sum(v.kl), "val/bpd_elbo": v.bits_per_dim}
        monitor.scalars(step, values | {f"val_active/layer_{i}": a for i, a in enumerate(v.active)})

    @torch.no_grad()
    def _draw(self, monitor: Monitor, step: int) -> None:
        if self.pictures is None or self.run_dir is None:
            return
        model = self.engine.model
        images = torch.cat(list(self._held_out(8, min(8, self.run.split.micro))))
        with self._averaged_weights():
            model.eval()
            try:
                if self.engine.rank == 0:
                    for name, picture in self.pictures(model, images, self.run_dir / "samples", step).items():
                        monitor.picture(step, name, picture)
            finally:
                model.train()

    def _save(self, monitor: Monitor, step: int) -> None:
        if step == self._saved_step:
            return
        self._saved_step = step
        state = self.engine.state()  # every process takes part
        if self.run_dir is None or self.engine.rank:
            return
        weights = {k[len("weight.") :]: v for k, v in state.items() if k.startswith("weight.")}
        buffers = {k[len("buffer.") :]: v for k, v in state.items() if k.startswith("buffer.")}
        if self.ema is not None:
            weights |= {name: p.detach() for name, p in self.ema.module.named_parameters()}
        held_out = self.last_validation if step == self._evaluated_step else None
        figures = {checkpoint.HELD_OUT_FIGURE: held_out.nelbo} if held_out is not None else {}
        path = checkpoint.save(self.run_dir, step, weights | buffers, state, self.profile.training.keep_last, figures)
        monitor.say(f"step {step}: saved {path}")

    # -- stopping --

    @contextlib.contextmanager
    def _signals(self, monitor: Monitor) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) saves and stops after the step under way, the second one kills."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self._stop_requested:
                monitor.say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")
            self._stop_requested = True

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever owns the signals decides
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
