"""The loop: steps, alarms, log lines, evaluations, pictures, checkpoints, and a clean end when asked to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae_lowmem.config.limits import LARGEST_STEPS
from nvae_lowmem.data.pipeline import Batches, MicroBatch, evaluation_batches, prefetched
from nvae_lowmem.data.sources import Datasets
from nvae_lowmem.errors import ConfigError, Diverged
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.hardware.find_card import device_name
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.regularizers import regularisation_values
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.alarms import Alarms
from nvae_lowmem.training.checkpoint_files import NotFinite
from nvae_lowmem.training.divergence import DivergenceGuard
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.engines.torch_engine import persistent_buffers
from nvae_lowmem.training.first_bad import first_bad
from nvae_lowmem.training.monitor import Monitor, is_early
from nvae_lowmem.training.pace import IN_WORDS, PERIODIC, Pace
from nvae_lowmem.training.schedule import Schedule
from nvae_lowmem.training.speed import Expected, promise
from nvae_lowmem.training.speed import record as record_speed
from nvae_lowmem.training.step import StepResult, Training, training_step
from nvae_lowmem.training.stopping import StopWish
from nvae_lowmem.training.time_budget import TimeBudget
from nvae_lowmem.training.validation import Validation, validate
from nvae_lowmem.units import GIB

MOST_FAILED_SAVES = 10
"""Saves in a row that may fail before training ends; they are tried again ten times as often as usual."""

Pictures = Callable[[NVAE, Tensor, Path, int], dict[str, np.ndarray]]
"""(model in evaluation mode, held-out images, samples folder, step) -> pictures by TensorBoard name."""


class SaveFailed(OSError):
    """Checkpoints cannot be written any more."""


class Trainer:
    """Trains from what was resumed, or from the beginning, to the end of the run, or until asked to stop."""

    def __init__(
        self,
        training: Training,
        data: Datasets,
        run_dir: Path | None,
        pictures: Pictures | None = None,
        resumed: checkpoint.Resumed | None = None,
        evaluation_seed: int | None = None,
        pace: Pace | None = None,
        budget: TimeBudget | None = None,
        expected: Expected | None = None,
    ) -> None:
        """resumed: what engine and average hold already. evaluation_seed: of noise on held-out images; None: the
        run's, which is another one after a rewind. budget: the time that training may take, measured by pace.
        expected: seconds per step, to be said beside those that are measured."""
        self.training, self.data, self.run_dir, self.pictures = training, data, run_dir, pictures
        self.run, self.engine, self.ema = training.run, training.engine, training.ema
        self.profile = self.run.profile
        self._pace, self._budget, self._due = pace or Pace(), budget, frozenset[str]()
        self._expected, self._promised = expected, False
        self.first_step = resumed.step if resumed is not None else 0
        self._evaluation_seed = self.profile.training.seed if evaluation_seed is None else evaluation_seed
        self._batches = Batches(
            data.train,
            self.profile.model,
            self.profile.data,
            self.profile.training.total_batch,
            self.profile.training.seed,
            self.profile.training.label_dropout,
        )
        self._guard = DivergenceGuard(self.profile.plan.precision)
        image = self.profile.model
        uniform_nats = image.image_dims * image.bits * math.log(2)
        self._alarms = Alarms(image.total_groups, uniform_nats, self.first_step, self.schedule.total_steps)
        if resumed is not None:
            self._alarms.load_state(resumed.training)
        self.stopped_by = 0
        """The signal that training was asked to stop by, when it was."""
        self._wish = StopWish()
        self._saved_step = self.first_step if resumed is not None else -1
        self._failed_saves = 0
        self.last_validation: Validation | None = None
        self._evaluated_step = -1

    def train(self, said: Sequence[tuple[str, str]] = ()) -> int:
        """Train; returns the number of finished steps. said: (kind, sentence) of what is told and written down first.

        Raises Diverged where further steps are pointless, and SaveFailed.
        """
        step = self.first_step
        with (
            contextlib.closing(self._micro_batches(step)) as micro_batches,
            Monitor(self.run_dir if self.engine.rank == 0 else None, self.total_steps, self.first_step) as monitor,
            self._wish.listening(),
        ):
            for kind, sentence in said:
                monitor.event(step, kind, sentence)
            monitor.configuration(step, self.profile)
            self._agree(monitor, step)
            while step < self.total_steps and not self.stopped_by:
                began = time.monotonic()
                try:
                    result = training_step(self.training, micro_batches, step)
                except Diverged as error:
                    half = "" if self.profile.plan.precision == "fp32" else " Or try --precision fp32."
                    raise self._diverged(monitor, f"{error}{half} {self._first_bad(step)}", step + 1) from None
                step += 1
                self._pace.step_done()
                self._look(monitor, result, step)
                self._report(monitor, result, step, time.monotonic() - began)
                last = step == self.total_steps
                if last or self._is_due("evaluate", step):
                    self._evaluate(monitor, step)
                if last or self._is_due("sample", step):
                    self._draw(monitor, step)
                if last or self._is_due("save", step):
                    self._save(monitor, step, last)
                self._wish.alive()
            self._record_speed()
            total = self.total_steps
            if step == total and (final := self.last_validation) is not None:
                monitor.outcome(self.profile, {"final/nelbo": final.nelbo, "final/bpd_elbo": final.bits_per_dim})
            if self._budget is not None:
                monitor.say(f"step {step}: {self._budget.summary()}")
            if self.stopped_by and step < total:
                self._save(monitor, step, last=True)
                name = signal.Signals(self.stopped_by).name
                monitor.say(
                    f"stopped after step {step} by {name}; the same command with --run-dir {self.run_dir} goes on"
                )
        return step

    @property
    def schedule(self) -> Schedule:
        """As it is now: with a time budget it changes."""
        return self.training.run.schedule

    @property
    def total_steps(self) -> int:
        """Of the whole run, as planned now."""
        return self.schedule.total_steps

    # -- whether to go on --

    def _agree(self, monitor: Monitor, step: int) -> None:
        """All processes learn whether one was asked to stop, whether the loss of one has blown up, and what time it is.

        The time is process 0's: how many steps there will be, and what is due by the clock.
        """
        own = (self._wish.number, int(bool(self._alarms.blown_up)), *self._timing(step))
        self.stopped_by, blown_up, planned, *due = distributed.largest(own, self.engine.device)
        self._due = frozenset(what for what, is_due in zip(PERIODIC, due, strict=True) if is_due)
        if planned:
            self._plan_anew(monitor, step, planned)
        if blown_up:
            cause = self._alarms.blown_up or "the loss of another process has blown up"
            advice = "Try a lower --set training.learning_rate, or clipped gradients (--set training.clip_norm=200)."
            raise self._diverged(monitor, f"step {step}: training has blown up: {cause}. {advice}", step)

    def _timing(self, step: int) -> tuple[int, ...]:
        """(a new number of steps or 0, and for each of PERIODIC whether it is due by the clock); process 0 decides."""
        planned, due = 0, set[str]()
        if self.engine.rank == 0:
            if self._budget is not None:
                planned = self._budget.plan(step, self.total_steps)
                due = self._budget.due(save_failed=self._failed_saves > 0)
            elif (minutes := self.profile.training.save_minutes) and self._pace.since("save") >= 60 * minutes:
                due = {"save"}
        return planned, *(int(what in due) for what in PERIODIC)

    def _plan_anew(self, monitor: Monitor, step: int, total_steps: int) -> None:
        """From `step` on, the run is to have another number of steps."""
        assert self._budget is not None
        run, before = self.training.run, self.total_steps
        schedule = self._budget.planned(run.schedule, step, total_steps)
        self.training = replace(self.training, run=replace(run, schedule=schedule))
        monitor.event(step, "schedule", self._budget.describe(step, before, total_steps))
        monitor.planned_anew(step, total_steps)

    def _is_due(self, what: str, step: int) -> bool:
        """Whether one of PERIODIC is to be done after `step` steps, which is not the last one."""
        every = self._every(what)
        if what in self._due or step % every == 0:
            return True
        return what == "save" and self._failed_saves > 0 and step % max(1, every // MOST_FAILED_SAVES) == 0

    def _every(self, what: str) -> int:
        """Steps between two of PERIODIC; more than there ever are where they go by time."""
        every = int(getattr(self.profile.training, f"{what}_every"))
        return every or (LARGEST_STEPS if self._budget is not None else max(1, self.total_steps // 10))

    def _look(self, monitor: Monitor, r: StepResult, step: int) -> None:
        """Alarms and divergence of a step that is done."""
        try:
            self._guard.check(r.update, step)
        except Diverged as error:
            raise self._diverged(monitor, str(error), step, error.curable) from None
        norm = r.update.gradient_norm
        nll, kl = float(r.nll), r.kl.tolist()
        full_beta = r.beta == self.profile.training.kl_beta_max
        figures = (step, float(r.loss), kl, None if norm is None else float(norm), nll, full_beta)
        before = self._alarms.episode_began
        for alarm in self._alarms.look(*figures):
            most = max(range(len(kl)), key=kl.__getitem__)
            text = f"{alarm} (reconstruction {nll:.4g}, most KL in group {most}: {kl[most]:.4g} nats)"
            monitor.event(step, "alarm", text)
            if before is None and self.run_dir is not None and self.engine.rank == 0:
                with contextlib.suppress(OSError):
                    checkpoint.mark_before_alarm(self.run_dir, step - 1, text)
        self._agree(monitor, step)

    def _diverged(self, monitor: Monitor, text: str, step: int, curable: bool = True) -> Diverged:
        """The error to raise, written down; states up to the first alarm are good."""
        monitor.event(step, "diverged", text)
        return Diverged(text, step, self._alarms.good_until(step), curable)

    def _first_bad(self, step: int) -> str:
        """Where in the network the first inf or NaN of step `step` (from 0) arose; all processes take part."""
        with self.engine.gathered():
            slots = self.run.split.slots(self.engine.rank)
            batches = (self._batches.micro_batch(step, s).to(self.engine.device) for s in slots)
            return first_bad(self.engine.model, batches, self.training.run, step)

    # -- pieces of a step --

    def _micro_batches(self, step: int) -> Generator[MicroBatch, None, None]:
        """This process' micro-batches on its device, in the order in which `training_step` asks for them."""
        total = self.total_steps if self._budget is None else LARGEST_STEPS
        slots, device = self.run.split.slots(self.engine.rank), self.engine.device
        on_card = device.type == "cuda"
        with contextlib.closing(prefetched(self._batches, step, total, slots, pin_memory=on_card)) as ready:
            for micro_batch in ready:
                yield micro_batch.to(device)

    def _report(self, monitor: Monitor, r: StepResult, step: int, seconds: float) -> None:
        config = self.profile.training
        early, batch = is_early(step, config.log_every), config.total_batch
        line = (
            f"nelbo {float(r.nll + r.kl.sum()):.1f}  recon {float(r.nll):.1f}  kl {float(r.kl.sum()):.1f}  "
            f"{batch / seconds:.1f} images/s"
        )
        memory = cuda_memory.torch_memory(self.engine.device)
        if memory:
            line += f"  peak {memory['memory/peak_allocated_gib']:.2f} GiB"
        if self._guard.overflows:
            line += f"  overflows {self._guard.overflows}"
        if self._guard.refused:
            line += f"  skipped {self._guard.refused}"
        monitor.progress(step, line, early, self._budget.left if self._budget is not None else None)
        if self.engine.rank == 0 and not self._promised and self._pace.is_settled:
            self._promise(monitor, step)
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
        norm = r.update.gradient_norm
        if norm is not None and math.isfinite(norm):
            values["train/gradient_norm"] = float(norm)
        if config.skip_gradient_norm or config.skip_gradient_quantile:
            values["train/skipped_steps"] = float(self._guard.refused)
        if predicted:
            values["memory/predicted_gib"] = predicted / GIB
        monitor.scalars(step, values | memory | cuda_memory.nvml_memory(self.engine.device))

    def _promise(self, monitor: Monitor, step: int) -> None:
        """Say when training ends, and how far the speed is from what was expected."""
        self._promised = True
        seconds, left_steps = self._pace.mean(), self.total_steps - step
        left = sum(self._pace.seconds.get(what, 0.0) * (left_steps // self._every(what) + 1) for what in PERIODIC)
        uncounted = [name for what, name in IN_WORDS.items() if what not in self._pace.seconds]
        if self._budget is not None:
            left, uncounted = self._budget.left, []
        else:
            left += left_steps * seconds
        device = device_name(self.engine.device)
        monitor.event(step, "speed", promise(step, seconds, device, left_steps, left, self._expected, uncounted))
        self._record_speed()

    def _record_speed(self) -> None:
        """What a step takes, into the run's configuration, once it is known well enough."""
        if self._promised and self.run_dir is not None:
            with contextlib.suppress(OSError, ConfigError):  # a full disk: training goes on
                record_speed(self.run_dir, self._pace.mean(), device_name(self.engine.device))

    def _held_out(self, count: int, batch: int) -> Iterator[Tensor]:
        model, data = self.profile.model, self.profile.data
        for x in evaluation_batches(self.data.test, model, data, batch, self._evaluation_seed, count):
            yield x.to(self.engine.device)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the model is whole, has its averaged weights, and the BatchNorm statistics of all processes."""
        with self.engine.gathered():
            if self.engine.world_size > 1:
                distributed.average_statistics(self.engine.model)
            with self.ema.applied_to(self.engine.model) if self.ema is not None else contextlib.nullcontext():
                yield

    def _evaluate(self, monitor: Monitor, step: int) -> None:
        training = self.profile.training
        with self._pace.timing("evaluate"), self._averaged_weights():
            v = validate(
                self.engine.model,
                self._held_out(training.evaluate_images, self.run.split.micro),
                self._evaluation_seed,
                self.profile.plan.precision,
                self.data.test.labels,
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
        with self._pace.timing("sample"), self._averaged_weights():
            model.eval()
            try:
                if self.engine.rank == 0:
                    for name, picture in self.pictures(model, images, self.run_dir / "samples", step).items():
                        monitor.picture(step, name, picture)
            except OSError as error:  # a full disk
                monitor.event(step, "pictures-failed", f"step {step}: no pictures: {error}; training goes on")
            finally:
                model.train()

    def _save(self, monitor: Monitor, step: int, last: bool) -> None:
        """Save, unless this step is saved. After a failed save training goes on, but only MOST_FAILED_SAVES times."""
        if step == self._saved_step:
            return
        with self._pace.timing("save"):
            state = self.engine.state()  # every process takes part
            state |= distributed.gather_statistics(self.engine.model)
            problem: OSError | NotFinite | None = distributed.from_first(lambda: self._write(monitor, step, state))
        if problem is None:
            self._saved_step, self._failed_saves = step, 0
            return
        if isinstance(problem, NotFinite):
            raise self._diverged(monitor, f"step {step}: {problem}; nothing is saved.", step)
        self._failed_saves += 1
        saved = f"the newest checkpoint is of step {self._saved_step}" if self._saved_step >= 0 else "none is saved yet"
        text = f"step {step}: the checkpoint cannot be written: {problem}; {saved}"
        if last or self._failed_saves >= MOST_FAILED_SAVES:
            raise SaveFailed(f"{text}. Make room, and start the same command with --run-dir {self.run_dir} again")
        monitor.event(step, "save-failed", f"{text}; training goes on and tries again")

    def _write(self, monitor: Monitor, step: int, state: dict[str, Tensor]) -> OSError | NotFinite | None:
        """Write a checkpoint; what went wrong, if anything did."""
        if self.run_dir is None:
            return None
        with distributed.mean_statistics(self.engine.model, state):
            buffers = {name: b.detach().clone() for name, b in persistent_buffers(self.engine.model).items()}
        weights = {k[len("weight.") :]: v for k, v in state.items() if k.startswith("weight.")}
        if self.ema is not None:
            weights |= {name: p.detach() for name, p in self.ema.module.named_parameters()}
        held_out = self.last_validation if step == self._evaluated_step else None
        figures = {checkpoint.HELD_OUT_FIGURE: held_out.nelbo} if held_out is not None else {}
        keep_last = self.profile.training.keep_last
        try:
            training = state | self._alarms.state()
            if self._budget is not None:
                training |= self._budget.state(self.schedule)
            path = checkpoint.save(self.run_dir, step, weights | buffers, training, keep_last, figures)
        except (OSError, NotFinite) as error:
            return error
        monitor.say(f"step {step}: saved {path}")
        return None
