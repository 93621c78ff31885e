"""The held-out ELBO while a profile is trained, of the weights themselves and of averages with several decays.

    python benchmarks/averages.py --profile demo-mnist --seed 0 --at 420 700 --decays 0.9 0.98

The steps are those of launch/train.py (`build_training`, `training_step`), on one process and the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.data.pipeline import Batches, MicroBatch, evaluation_batches
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.build import build_model, build_training
from nvae_lowmem.training.ema import WeightEma
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run
from nvae_lowmem.training.step import training_step
from nvae_lowmem.training.validation import validate


def micro_batches(run: ResolvedRun, data: Datasets) -> Iterator[MicroBatch]:
    """What the trainer gives to each step."""
    profile, config = run.profile, run.profile.training
    batches = Batches(data.train, profile.model, profile.data, config.total_batch, config.seed)
    for step in range(run.schedule.total_steps):
        for slot in run.split.slots(0):
            yield MicroBatch(slot.start, batches.batch(step, slot))


def held_out_nats(model: NVAE, run: ResolvedRun, data: Datasets) -> float:
    """-ELBO of all held-out images, with the noise of the run's own evaluations."""
    profile, seed = run.profile, run.profile.training.seed
    images = evaluation_batches(data.test, profile.model, profile.data, run.split.micro, seed)
    return round(validate(model, images, seed).nelbo, 3)


def train(profile: Profile, at: list[int], decays: list[float]) -> Iterator[dict[str, float]]:
    """A row of figures after each of the steps `at`."""
    data = open_source(profile.data, profile.model)
    run = resolve_run(profile, len(data.train), torch.device("cpu"), 1)
    model = build_model(run.profile)
    averages = {decay: WeightEma(model, decay) for decay in decays}  # before policies are put on the model
    training = build_training(run, model, torch.device("cpu"))
    ready, began = micro_batches(run, data), time.process_time()
    for step in range(run.schedule.total_steps):
        training_step(training, ready, step)
        for average in averages.values():
            average.update(training.engine.model, step + 1)
        if step + 1 in at:
            row = {"step": float(step + 1), "cpu_seconds": round(time.process_time() - began, 1)}
            row["none"] = held_out_nats(training.engine.model, run, data)
            for decay, average in averages.items():
                with average.applied_to(training.engine.model):
                    row[f"{decay:g}"] = held_out_nats(training.engine.model, run, data)
            training.engine.model.train()
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--profile", default="demo-mnist")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at", type=int, nargs="+", default=[140, 280, 420, 560, 700])
    parser.add_argument("--decays", type=float, nargs="+", default=[0.9, 0.98, 0.99])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profile = profiles.override(profiles.load(args.profile), [f"training.seed={args.seed}", *args.set])
    rows = []
    for row in train(profile, args.at, args.decays):
        print(row, flush=True)
        rows.append(row)
    if args.out:
        args.out.write_text(json.dumps({"seed": args.seed, "set": args.set, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
