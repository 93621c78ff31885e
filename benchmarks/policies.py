"""What the memory policies save and what they cost: bytes kept per image and seconds per step, as ratios to `all`.

    python benchmarks/policies.py --threads 2 --json policies.json
    python benchmarks/policies.py --recipe tiny --steps 3

Bytes are of the recipe as published: saved activations and block inputs that the fake trace of a training step holds
at the end of forward, in fp32; what `host` moves into host memory stands beside it. Seconds are those of real steps on
this CPU at a small batch, the policies taking turns on one model, so that other load falls on all of them. Where a step
would take longer than --step-seconds or need more memory than is free, the model that is timed has fewer groups per
scale, and the table says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import headline, machine, write_json

from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.recipes import RECIPES, recipe, with_groups
from nvae_lowmem.config.sections import KEEPS, Keep, MemoryPlan, Profile
from nvae_lowmem.data.pipeline import MicroBatch
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.memory.trace.training import trace_training
from nvae_lowmem.model.keep import apply_plan
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.build import build_model, build_training
from nvae_lowmem.training.resolve import run_without_data
from nvae_lowmem.training.step import training_step
from nvae_lowmem.units import format_bytes, format_seconds

DEFAULT_RECIPES = ("tiny", "mnist", "cifar10", "celeba64")
BYTES_PER_PARAMETER = 20  # weight, gradient, two Adamax states, and the weight as it is used, layer by layer
CPU = torch.device("cpu")


# --- bytes ------------------------------------------------------------------------------------------------------------


def kept_bytes_per_image(profile: Profile, keep: Keep, batch: int) -> tuple[float, float]:
    """(bytes kept on the card, bytes moved to the host) per image when the forward pass of a traced step ends."""
    plan = MemoryPlan(keep=keep, precision="fp32", engine="torch")
    trace = trace_training(replace(profile, plan=plan), batch, steps=1)
    end = next(a.born for a in trace.allocations if a.phase == "backward")
    live = [a for a in trace.allocations if a.phase == "forward" and a.born < end and not 0 <= a.died < end]
    kept = sum(a.nbytes for a in live if a.category in ("saved activation", "block input"))
    return kept / batch, sum(a.nbytes for a in live if a.category == "host") / batch


# --- seconds ----------------------------------------------------------------------------------------------------------


class Bench:
    """One model in training, whose policy can be changed between steps."""

    def __init__(self, profile: Profile, batch: int) -> None:
        plan = MemoryPlan(precision="fp32", engine="torch")
        without_average = replace(profile, plan=plan, training=replace(profile.training, ema_decay=0.0))
        self._run, self._step = run_without_data(without_average, batch, total_steps=1000), 1
        self._model = build_model(profile)
        self._training = build_training(self._run, self._model, CPU)
        c = profile.model
        self._images = torch.rand(batch, c.image_channels, c.network_size, c.network_size)
        if c.bits == 1:
            self._images = self._images.round()

    def seconds_of_step(self, keep: Keep) -> float:
        """One optimiser step with every block under this policy."""
        apply_plan(self._model, replace(self._run.profile.plan, keep=keep))
        start = time.perf_counter()
        result = training_step(self._training, iter([MicroBatch(0, self._images)]), self._step)
        seconds = time.perf_counter() - start
        if not bool(result.loss.isfinite()):
            raise RuntimeError(f"step {self._step} under {keep!r}: the loss is {float(result.loss)}")
        self._step += 1
        return seconds


def fewer_groups(model: ModelConfig, share: int) -> ModelConfig:
    """The model with 1/share of its groups in every scale, at least one (and two in all: one is a plain VAE)."""
    groups = [max(1, g // share) for g in model.scale_groups]
    if groups == [1]:
        groups = [min(2, model.scale_groups[0])]
    return with_groups(model, tuple(groups))


def parameters_of(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in NVAE(model).parameters())


def fitting_model(profile: Profile, batch: int, kept_per_image: float, step_seconds: float) -> tuple[ModelConfig, str]:
    """The largest of the model, its half, its quarter ... that this machine can time, and why, where it is not all.

    A step's time is taken to grow with the number of groups from that of the smallest model, measured; memory is the
    weights and what autograd keeps, in 2/3 of what is free.
    """
    full = profile.model
    smallest = fewer_groups(full, max(full.scale_groups))
    bench = Bench(replace(profile, model=smallest), batch)
    bench.seconds_of_step("all")  # the first step makes 40 power iterations per layer and oneDNN's kernels
    per_group = bench.seconds_of_step("all") / smallest.total_groups
    del bench
    free = psutil.virtual_memory().available * 2 / 3
    share, model = 1, full
    while model != smallest:
        seconds = per_group * model.total_groups
        groups_share = model.total_groups / full.total_groups
        need = BYTES_PER_PARAMETER * parameters_of(model) + kept_per_image * batch * groups_share
        if seconds <= step_seconds and need <= free:
            break
        share *= 2
        model = fewer_groups(full, share)
    if model.scale_groups == full.scale_groups:
        return full, ""
    seconds, need = per_group * full.total_groups, BYTES_PER_PARAMETER * parameters_of(full) + kept_per_image * batch
    return model, (
        f"timed with {list(model.scale_groups)} groups per scale in place of {list(full.scale_groups)}: on this "
        f"machine the whole model would take about {format_seconds(seconds)} per step and {format_bytes(need)}"
    )


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes and seconds of every policy for one recipe."""
    profile = recipe(name)
    kept = {keep: kept_bytes_per_image(profile, keep, options.trace_batch) for keep in KEEPS}
    model, scaled_down = fitting_model(profile, options.batch, kept["all"][0], options.step_seconds)
    bench = Bench(replace(profile, model=model), options.batch)
    seconds: dict[Keep, list[float]] = {keep: [] for keep in KEEPS}
    for turn in range(options.steps + 1):
        for keep in KEEPS:
            taken = bench.seconds_of_step(keep)
            if turn:  # the first turn makes the optimiser's states and grows the heap
                seconds[keep].append(taken)
    medians = {keep: statistics.median(values) for keep, values in seconds.items()}
    policies = {
        keep: {
            "kept_bytes_per_image": kept[keep][0],
            "host_bytes_per_image": kept[keep][1],
            "kept_ratio": kept[keep][0] / kept["all"][0],
            "step_seconds": seconds[keep],
            "step_median_seconds": medians[keep],
            "step_ratio": medians[keep] / medians["all"],
        }
        for keep in KEEPS
    }
    return {"scaled_down": scaled_down, "timed_groups_per_scale": list(model.scale_groups), "policies": policies}


def show(name: str, found: dict[str, Any]) -> None:
    for keep, row in found["policies"].items():
        host = f" + host {format_bytes(row['host_bytes_per_image'])}" if row["host_bytes_per_image"] else ""
        print(
            f"{name:<10} {keep:<6} {format_bytes(row['kept_bytes_per_image']):>12} {row['kept_ratio']:>7.3f} "
            f"{row['step_median_seconds']:>10.3f} s {row['step_ratio']:>7.2f}{host}",
            flush=True,
        )
    if found["scaled_down"]:
        print(f"{'':<10} {found['scaled_down']}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="may be repeated; default: four of them")
    parser.add_argument("--batch", type=int, default=4, help="images of a timed step")
    parser.add_argument("--trace-batch", type=int, default=8, help="images of the traced step, which computes nothing")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each policy")
    parser.add_argument("--step-seconds", type=float, default=10.0, help="time fewer groups where a step takes longer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, settings and every figure to FILE")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    about = machine(options.threads)
    print(headline(about))
    print(f"bytes of the published recipe in fp32; seconds at batch {options.batch}, median of {options.steps} steps")
    print(f"{'recipe':<10} {'keep':<6} {'kept/image':>12} {'ratio':>7} {'step':>12} {'ratio':>7}")
    recipes = {}
    for name in options.recipe or DEFAULT_RECIPES:
        recipes[name] = measure(name, options)
        show(name, recipes[name])
    settings = {"batch": options.batch, "trace_batch": options.trace_batch, "steps": options.steps}
    write_json(options.json, {**about, **settings, "recipes": recipes})


if __name__ == "__main__":
    main()
