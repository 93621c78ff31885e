"""One training of a run in its folder, from what is there to the end: resume, changed settings, rewinds.

Rank 0 decides and writes; the other processes are told, so that all of them go on from the same step or raise the same
error.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import EngineName
from nvae_lowmem.data.fingerprint import record_or_compare
from nvae_lowmem.data.pipeline import Batches
from nvae_lowmem.data.sources import Datasets
from nvae_lowmem.errors import ConfigError, Diverged, OutOfMemory
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import changes, checkpoint, rewind, runs
from nvae_lowmem.training.build import build_model, build_training, engine_factory
from nvae_lowmem.training.engines import distributed
from nvae_lowmem.training.initial_weights import InitialWeights, take_over
from nvae_lowmem.training.out_of_memory import is_out_of_memory, report
from nvae_lowmem.training.pace import Pace
from nvae_lowmem.training.resolve import ResolvedRun
from nvae_lowmem.training.speed import Expected
from nvae_lowmem.training.step import Training
from nvae_lowmem.training.time_budget import TimeBudget
from nvae_lowmem.training.trainer import Pictures, Trainer

Said = list[tuple[str, str]]
"""(kind, sentence) of what is told and written down as training begins."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What is trained, where, and how; the same in every process but for the rank."""

    run: ResolvedRun
    data: Datasets
    engine: EngineName
    device: torch.device
    rank: int
    run_dir: Path
    pictures: Pictures | None = None
    resume_from: int | None = None
    """Go on from the checkpoint of this step, not from the newest."""
    most_rewinds: int = 3
    began: float | None = None
    """When this process began, by time.monotonic, where the time of training is limited; None: as `train` begins."""
    expected: Expected | None = None
    """Seconds per step as they were measured or estimated before; None: not known."""
    initial: Callable[[], InitialWeights] | None = None
    """Reads the weights that a new run begins from; None: random ones."""

    def train(self) -> int:
        """Train to the end, or until asked to stop; returns the number of the signal that asked, 0 at the end.

        Raises ConfigError when the folder holds another run, is in use, or has no checkpoint that can be used, Diverged
        when training blew up once more than it may go back, OutOfMemory, and OSError when nothing can be written.
        """
        with runs.locked(self.run_dir) if self.rank == 0 else contextlib.nullcontext():
            model = build_model(self.run.profile)
            resumed = self._resume(model, self.resume_from)
            pace = Pace()
            budget = self._budget(pace, resumed)
            run = self._timed(self.run, budget, resumed)
            total = run.schedule.total_steps
            if resumed is not None and resumed.step >= total:
                if self.rank == 0:
                    print(f"{self.run_dir} is already done: {resumed.step} of {total} steps")
                return 0
            said: Said = distributed.from_first(lambda: self._record_configuration(run, resumed))
            said += self._begin_from(model, resumed)
            while True:
                made: list[rewind.Rewind] = distributed.from_first(lambda: rewind.rewinds(self.run_dir))
                run = self._timed(rewind.after_rewinds(self.run, made), budget, resumed)
                try:
                    return self._train_from(run, model, resumed, said, pace, budget)
                except Diverged as error:
                    raised = Diverged(*error.args)  # the one that was raised holds frames, and so the card's memory
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise OutOfMemory(
                        report(error, run.profile.with_plan(engine=self.engine), model.blocks, self.device)
                    ) from None
                last = self._go_back(raised)
                run = rewind.after_rewinds(self.run, [*made, last])
                said = [("rewind", rewind.rewind_text(last, run))]
                del model
                gc.collect()  # engines hold themselves in circles
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                model = build_model(self.run.profile)
                resumed = self._resume(model, last.back_to or None) if last.back_to else None
                said += self._begin_from(model, resumed)

    def _begin_from(self, model: NVAE, resumed: checkpoint.Resumed | None) -> Said:
        """Give the model of a run without a checkpoint the weights that it is to begin from."""
        if self.initial is None or resumed is not None:
            return []
        return [("weights", take_over(model, self.initial()))]

    def _go_back(self, error: Diverged) -> rewind.Rewind:
        return distributed.from_first(lambda: rewind.go_back(self.run_dir, self.run, error, self.most_rewinds))

    def _budget(self, pace: Pace, resumed: checkpoint.Resumed | None) -> TimeBudget | None:
        """The time that training may take, where it is limited."""
        config = self.run.profile.training
        state = resumed.training if resumed is not None else {}
        return TimeBudget(config, pace, state, self.began) if config.hours else None

    def _timed(self, run: ResolvedRun, budget: TimeBudget | None, resumed: checkpoint.Resumed | None) -> ResolvedRun:
        """The run with the number of steps that its time leaves, where it is limited."""
        if budget is None:
            return run
        step, state = (resumed.step, resumed.training) if resumed is not None else (0, {})
        seconds = self.expected.least_seconds if self.expected is not None else 0.0
        return replace(run, schedule=budget.taken_up(run.schedule, step, state, seconds))

    def _train_from(
        self,
        run: ResolvedRun,
        model: NVAE,
        resumed: checkpoint.Resumed | None,
        said: Said,
        pace: Pace,
        budget: TimeBudget | None,
    ) -> int:
        """Build everything around the model and train it from the checkpoint."""
        training = build_training(
            run, model, self.device, engine_factory(self.engine), None if resumed else self._first_images
        )
        try:
            if resumed is not None:
                _load(training, resumed)
            seed = self.run.profile.training.seed
            trainer = Trainer(
                training,
                self.data,
                self.run_dir,
                self.pictures,
                resumed,
                evaluation_seed=seed,
                pace=pace,
                budget=budget,
                expected=self.expected,
            )
            if resumed is not None:  # it is on the device now, and the host may have little to spare
                resumed.training.clear()
                resumed.weights.clear()
            trainer.train(said)
            return trainer.stopped_by
        finally:
            close = getattr(training.engine, "close", None)
            if close is not None:
                close()

    def _first_images(self, step: int) -> Tensor:
        """The first micro-batch of a step, from which a model may be initialised."""
        profile = self.run.profile
        config = profile.training
        batches = Batches(self.data.train, profile.model, profile.data, config.total_batch, config.seed)
        return batches.batch(step, slice(0, profile.plan.micro_batch))

    def _resume(self, model: NVAE, step: int | None) -> checkpoint.Resumed | None:
        """What training goes on from, in every process the same."""
        found: checkpoint.Resumed | None = None

        def decide() -> int | None:
            nonlocal found
            for sentence in checkpoint.tidy(self.run_dir):
                print(sentence, flush=True)
            found = checkpoint.resume(self.run_dir, model, step)
            if found is None:
                return None
            for sentence in found.passed_over:
                print(f"passed over: {sentence}", flush=True)
            if step is not None:
                for aside in checkpoint.replace_after(self.run_dir, step):
                    print(f"set aside: {aside}, until training has got that far again", flush=True)
            if found.step < self.run.schedule.total_steps or self.run.profile.training.hours:
                print(f"resuming {self.run_dir} after step {found.step}", flush=True)
            return found.step

        agreed: int | None = distributed.from_first(decide)
        return checkpoint.resume(self.run_dir, model, agreed) if self.rank and agreed is not None else found

    def _record_configuration(self, run: ResolvedRun, resumed: checkpoint.Resumed | None) -> Said:
        """Write config.toml, or what has changed in it; (kind, sentence) of what is to be said of it."""
        path, now = self.run_dir / changes.CONFIG, self.run.profile.with_absolute_paths()
        header = f"nvae-lowmem run {self.run_dir.name}"
        other_data = record_or_compare(self.run_dir, self.data.fingerprint)
        said = [("data", other_data)] if other_data else []
        if resumed is None:
            profiles.save(now, path, header=header)
            return said
        before = profiles.load(path)
        found = changes.changes(before, now)
        if changes.differ(before, now):
            changes.keep_history(self.run_dir, resumed.step)
            profiles.save(now, path, header=header)
        said += [("settings", f"from step {resumed.step + 1} on, {change}") for change in found]
        if found:
            said.append(("settings", changes.next_step(run, resumed.step)))
        return said


def _load(training: Training, resumed: checkpoint.Resumed) -> None:
    """The checkpoint into engine and average."""
    training.engine.load_state(resumed.training)
    distributed.restore_statistics(training.engine.model, resumed.training)
    if training.ema is not None:
        training.ema.module.load_state_dict(resumed.weights)
        with training.engine.gathered():
            training.ema.follow_frozen(training.engine.model)


def check_changes(run_dir: Path, run: ResolvedRun) -> None:
    """Raises ConfigError when the folder holds a run that this one cannot go on from."""
    if checkpoint.newest(run_dir) is not None:
        try:
            changes.changes(profiles.load(run_dir / changes.CONFIG), run.profile)
        except ConfigError as error:
            raise ConfigError(f"--run-dir {run_dir}: {error}") from None
