"""Which size of model is best after so many minutes? Rungs of the ladder, each trained for the same CPU seconds.

    python benchmarks/hours_study.py --data mnist5k --minutes 2 8 --json study.json
    python benchmarks/hours_study.py --data faces --minutes 4 12 --json study.json
    python benchmarks/hours_study.py --picture hours-study.png --from study.json

A budget counts the CPU seconds of the training steps (time.process_time), so that what else a machine does matters
little. A few steps are timed first; the budget then gives the number of steps, and the cosine ends with the last one.
Figures are the negative ELBO of held-out images with averaged weights, one seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import headline, machine, write_json

from nvae_lowmem.budget.ladder import LADDER
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.sections import DataConfig, Profile, TrainConfig
from nvae_lowmem.data.pipeline import Batches, evaluation_batches, prefetched
from nvae_lowmem.data.sources import Datasets, open_source
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.training.build import build_model, build_training
from nvae_lowmem.training.resolve import ResolvedRun, resolve_run
from nvae_lowmem.training.step import Training, training_step
from nvae_lowmem.training.validation import Validation, validate

CPU = torch.device("cpu")
TIMED_STEPS = 6
HELD_OUT = {"mnist5k": 500, "faces": 200}
# what both sets are trained with, whatever the size of the model
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist5k": {"size": 28, "channels": 1, "bits": 1, "batch": 16, "rate": 5e-3, "test": 0.05, "demo": "demo-mnist"},
    "faces": {"size": 64, "channels": 3, "bits": 5, "batch": 8, "rate": 1e-2, "test": 0.1, "demo": "demo-faces"},
}


def profile_of(data: str, rung: str, images: int, batch: int, rate: float) -> Profile:
    """The profile of one case, but for its number of steps; rung "demo": the shipped demo's model."""
    s = SETTINGS[data] | ({"batch": batch} if batch else {}) | ({"rate": rate} if rate else {})
    ladder = rung != "demo"
    model = LADDER[int(rung)].model(s["size"], s["channels"], s["bits"]) if ladder else profiles.load(s["demo"]).model
    training = TrainConfig(total_batch=s["batch"], learning_rate=s["rate"], warmup_epochs=0, steps=1)
    source = DataConfig(source=data, flip=s["channels"] == 3, test_fraction=s["test"], max_images=images)
    return Profile(name=f"{data}-{rung}", model=model, data=source, training=training).with_plan(precision="fp32")


def with_steps(profile: Profile, images: int, steps: int) -> ResolvedRun:
    """The run of so many steps: 5 % warm-up, the cosine per step, an average over the last thirtieth."""
    training = replace(profile.training, steps=steps, ema_decay=max(0.9, 1 - 30 / steps))
    run = resolve_run(replace(profile, training=training), images, CPU, 1)
    return replace(run, schedule=run.schedule._replace(steps_per_epoch=1, warmup_steps=max(1, steps // 20)))


def train(run: ResolvedRun, data: Datasets, steps: int) -> tuple[Training, float]:
    """(what was trained for `steps` steps, CPU seconds of the steps)."""
    profile = run.profile
    training = build_training(run, build_model(profile), CPU)
    batches = Batches(data.train, profile.model, profile.data, run.split.total, profile.training.seed)
    micro_batches = prefetched(batches, 0, steps, run.split.slots(0))
    began = time.process_time()
    for step in range(steps):
        training_step(training, micro_batches, step)
    return training, time.process_time() - began


def held_out(training: Training, data: Datasets) -> Validation:
    """The figures of the averaged weights."""
    profile, model = training.run.profile, training.engine.model
    images = evaluation_batches(
        data.test, profile.model, profile.data, 50, profile.training.seed, HELD_OUT[profile.data.source]
    )
    assert training.ema is not None
    with training.ema.applied_to(model):
        return validate(model, images, profile.training.seed)


def seconds_per_step(profile: Profile, data: Datasets) -> float:
    """CPU seconds of a step, from a few real ones; the first, which also sets everything up, does not count."""
    run = with_steps(profile, len(data.train), 1000)
    _, once = train(run, data, 1)
    _, several = train(run, data, 1 + TIMED_STEPS)
    return (several - once) / TIMED_STEPS


def case(data_name: str, rung: str, minutes: float, images: int, batch: int, rate: float) -> dict[str, Any]:
    """Train one rung for a budget, and say how good it became."""
    profile = profile_of(data_name, rung, images, batch, rate)
    data = open_source(profile.data, profile.model, log=print)
    per_step = seconds_per_step(profile, data)
    steps = max(20, round(60 * minutes / per_step))
    training, seconds = train(with_steps(profile, len(data.train), steps), data, steps)
    found, batch = held_out(training, data), profile.training.total_batch  # which is the default's where it was 0
    return {
        "data": data_name, "rung": rung, "budget_minutes": minutes, "training_images": len(data.train),
        "parameters": sum(p.numel() for p in training.engine.model.parameters()),
        "groups_per_scale": list(profile.model.scale_groups), "width": profile.model.channels_encoder,
        "batch": batch, "learning_rate": profile.training.learning_rate,
        "steps": steps, "images_seen": steps * batch, "cpu_seconds": round(seconds, 1),
        "nats": round(found.nelbo, 3), "bits_per_dim": round(found.bits_per_dim, 4),
    }  # fmt: skip


def picture(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out figure over budget, one line per size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(c["data"] for c in cases))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        unit = "nats" if name == "mnist5k" else "bits_per_dim"
        for rung in sorted({c["rung"] for c in cases if c["data"] == name}):
            own = sorted((c["cpu_seconds"] / 60, c[unit]) for c in cases if (c["data"], c["rung"]) == (name, rung))
            axis.plot(*zip(*own, strict=True), marker="o", label=rung if rung == "demo" else f"rung {rung}")
        axis.set(xscale="log", xlabel="CPU minutes of training", ylabel=f"held-out -ELBO, {unit}", title=name)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def markdown(cases: Sequence[dict[str, Any]]) -> str:
    """A row per set and budget with every size's figure, the best one in bold."""
    rungs = sorted({str(c["rung"]) for c in cases})
    lines = ["| images | CPU minutes | " + " | ".join(r if r == "demo" else f"rung {r}" for r in rungs) + " |"]
    lines.append("|" + " --- |" * (2 + len(rungs)))
    for data, minutes in sorted({(c["data"], c["budget_minutes"]) for c in cases}, key=lambda k: (k[0] == "faces", k)):
        own = {str(c["rung"]): c for c in cases if (c["data"], c["budget_minutes"]) == (data, minutes)}
        best = min(own, key=lambda rung: own[rung]["nats"])
        unit, digits = ("nats", 2) if data == "mnist5k" else ("bits_per_dim", 3)
        cells = []
        for rung in rungs:
            text = f"{own[rung][unit]:.{digits}f} ({own[rung]['images_seen']:,} images)" if rung in own else ""
            cells.append(f"**{text}**" if rung == best else text)
        lines.append(f"| {data} | {minutes:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(SETTINGS))
    parser.add_argument("--rungs", nargs="+", default=["demo", "0", "1", "2"], choices=("demo", *map(str, range(7))))
    parser.add_argument("--minutes", type=float, nargs="+", default=[2])
    parser.add_argument("--images", type=int, default=0, help="train on the first so many images only; 0: all")
    parser.add_argument("--batch", type=int, default=0, help="another batch than the set's")
    parser.add_argument("--rate", type=float, default=0.0, help="another learning rate than the set's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the cases to FILE, one by one")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="cases for --picture")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.picture is not None:
        cases = json.loads(options.source.read_text())["cases"]
        picture(cases, options.picture)
        print(markdown(cases))
        return
    keep_freed_memory()
    about = machine(torch.get_num_threads())
    print(headline(about), flush=True)
    for minutes in options.minutes:
        for rung in options.rungs:
            found = case(options.data, rung, minutes, options.images, options.batch, options.rate)
            print(json.dumps(found), flush=True)
            before = json.loads(options.json.read_text())["cases"] if options.json and options.json.is_file() else []
            write_json(options.json, {**about, "settings": SETTINGS, "cases": [*before, found]})


if __name__ == "__main__":
    main()
