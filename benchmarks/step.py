"""Seconds per training step and peak memory of whole recipes on this machine's CPU, engine by engine.

    python benchmarks/step.py --threads 2 --json step.json
    python benchmarks/step.py --recipe tiny --engine torch --steps 5

Every case is a process of its own, so that its peak (ru_maxrss) is its own: the whole process, with Python, torch and,
where it is used, DeepSpeed; what the process holds before there is a model stands beside it. The batch is the recipe's
own, split into micro-batches. deepspeed is ZeRO stage 2 with the optimiser in host memory, which on a CPU is the same
memory: it shows the engine's cost, not its saving.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# nothing that is large: Linux counts a parent's memory as its child's until the child is another program
from machine import headline, machine, write_json

MICRO_BATCHES = {"tiny": 32, "mnist": 20}  # the divisor of the published batch that is timed
ENGINES = ("torch", "deepspeed")
GIB = 1 << 30


def run_case(name: str, engine_name: str, micro: int, keep: str, steps: int, threads: int) -> dict[str, Any]:
    """In the case's own process: train, and tell every step's seconds and the peak."""
    from dataclasses import replace

    import torch

    from nvae_lowmem.config.recipes import recipe
    from nvae_lowmem.config.sections import MemoryPlan
    from nvae_lowmem.data.pipeline import MicroBatch
    from nvae_lowmem.hardware.cpu import keep_freed_memory
    from nvae_lowmem.training.build import build_model, build_training, engine_factory
    from nvae_lowmem.training.engines import distributed
    from nvae_lowmem.training.resolve import run_without_data
    from nvae_lowmem.training.step import training_step

    torch.set_num_threads(threads)
    keep_freed_memory()
    device, profile = torch.device("cpu"), recipe(name)
    plan = MemoryPlan(
        engine=engine_name, precision="fp32", micro_batch=micro, keep=keep,  # type: ignore[arg-type]
        zero_stage=2, offload_optimizer=engine_name == "deepspeed",
    )  # fmt: skip
    profile = replace(profile, plan=plan).check()
    if engine_name == "deepspeed":
        distributed.initialise(device)
    before_bytes = peak_bytes()
    total = profile.training.total_batch
    accumulation = total // micro
    c, model = profile.model, build_model(profile)
    run = run_without_data(
        replace(profile, training=replace(profile.training, ema_decay=0.0)), micro, accumulation, total_steps=1000
    )
    training = build_training(run, model, device, engine_factory(engine_name))  # type: ignore[arg-type]
    images = torch.rand(micro, c.image_channels, c.network_size, c.network_size).round()
    seconds = []
    for step in range(1, steps + 2):
        start = time.perf_counter()
        training_step(training, itertools.repeat(MicroBatch(0, images)), step)
        seconds.append(time.perf_counter() - start)
    distributed.shutdown()
    return {
        "recipe": name, "engine": engine_name, "total_batch": total, "micro_batch": micro, "keep": keep,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_seconds": seconds[1:], "step_median_seconds": statistics.median(seconds[1:]),
        "before_bytes": before_bytes, "peak_bytes": peak_bytes(),
    }  # fmt: skip


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    import resource  # not on Windows, where the benchmark does not run

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_own_process(name: str, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """`run_case` in a child. Raises SystemExit with the child's words if it fails."""
    case = {
        "name": name, "engine_name": engine, "micro": options.micro_batch or MICRO_BATCHES[name],
        "keep": options.keep, "steps": options.steps, "threads": options.threads,
    }  # fmt: skip
    repository = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (repository, os.environ.get("PYTHONPATH", "")) if p)
    # torch reads the number of threads when it starts, DeepSpeed and oneDNN too
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"step.py: {name} with {engine} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=tuple(MICRO_BATCHES), action="append", help="default: both")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="default: both")
    parser.add_argument("--micro-batch", type=int, default=0, help="images per pass; 0: 32 for tiny, 20 for mnist")
    parser.add_argument("--keep", choices=("all", "cheap", "input", "host"), default="all", help="policy of the blocks")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, settings and every figure to FILE")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(run_case(**options.case)))
        return

    about = machine(options.threads)
    print(headline(about))
    print("recipe  engine     parameters  batch = micro x times  seconds/step     images/s  peak GiB  of it before")
    cases = []
    for name in options.recipe or MICRO_BATCHES:
        for engine in options.engine or ENGINES:
            case = in_own_process(name, engine, options)
            cases.append(case)
            batch, micro, seconds = case["total_batch"], case["micro_batch"], case["step_median_seconds"]
            print(
                f"{name:<7} {engine:<10} {case['parameters']:>10,} {batch:>6} = {micro:>3} x {batch // micro:<10} "
                f"{seconds:>11.2f} {batch / seconds:>12.2f} {case['peak_bytes'] / GIB:>9.2f} "
                f"{case['before_bytes'] / GIB:>13.2f}",
                flush=True,
            )
    write_json(options.json, {**about, "keep": options.keep, "steps": options.steps, "cases": cases})


if __name__ == "__main__":
    main()
