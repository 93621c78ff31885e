"""Seconds per step of torch's Adamax and of HostAdamax on fp32 host tensors.

    python benchmarks/host_adamax.py --parameters 100e6 --threads 2 --json host_adamax.json
    python benchmarks/host_adamax.py --recipe cifar10 --threads 2

The first is one flat tensor, as ZeRO hands it over; the second a recipe's own list of parameters, as the torch engine
does.

The two take turns, step by step, so that other load on the machine falls on both. `--busy 1` adds such load: that
many processes that compute all the time, as data loading beside the update does. Needs about 40 bytes per parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training.engines.host_adamax import CHUNK_ELEMENTS, HostAdamax


def count(text: str) -> int:
    """A count of at least 1 that may be written 100e6."""
    number = float(text)
    if not number >= 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1, such as 100e6")
    return int(number)


def seconds_of_step(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep `number` processors busy within the context."""
    command = [sys.executable, "-c", "while True: sum(range(10000))"]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def recipe_sizes(name: str) -> list[int]:
    """Elements of each parameter of a recipe's model, which is not filled with numbers for that."""
    with torch.device("meta"):
        return [parameter.numel() for parameter in NVAE(recipe(name).model).parameters()]


def compare(sizes: list[int], steps: int, weight_decay: float, busy: int) -> dict[str, Any]:
    """Time both optimizers, by turns, on equal parameters with `sizes` elements and the same gradients."""
    weights = {name: [torch.full((size,), 0.5) for size in sizes] for name in ("torch", "host")}
    generator = torch.Generator().manual_seed(0)
    for size, *pair in zip(sizes, *weights.values(), strict=True):
        grad = torch.empty(size).normal_(generator=generator)
        for tensor in pair:
            tensor.grad = grad
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": weight_decay}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "torch": torch.optim.Adamax(weights["torch"], foreach=False, **settings),
        "host": HostAdamax(weights["host"], **settings),
    }
    for optimizer in optimizers.values():
        optimizer.step()  # not timed: the first step makes the state, and the system its pages
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    with busy_processes(busy):
        for _ in range(steps):
            for name, optimizer in optimizers.items():
                seconds[name].append(seconds_of_step(optimizer))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "torch_adamax_seconds": seconds["torch"],
        "host_adamax_seconds": seconds["host"],
        "torch_adamax_median_seconds": median["torch"],
        "host_adamax_median_seconds": median["host"],
        "ratio_of_medians": median["torch"] / median["host"],
        "largest_difference": max((a - b).abs().max().item() for a, b in zip(*weights.values(), strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes_from = parser.add_mutually_exclusive_group()
    sizes_from.add_argument("--parameters", type=count, default=count("100e6"), help="elements, such as 100e6")
    sizes_from.add_argument("--recipe", choices=RECIPES, help="the parameters of this recipe's model")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--steps", type=count, default=15, help="timed steps of each optimizer")
    parser.add_argument("--weight-decay", type=float, default=3e-4, help="the published value; 0 saves one operation")
    parser.add_argument("--busy", type=int, default=0, help="other processes that keep a processor busy meanwhile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, machine and every time to FILE")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    sizes = recipe_sizes(options.recipe) if options.recipe else [options.parameters]
    report = {
        "parameters": sum(sizes),
        "tensors": len(sizes),
        "threads": options.threads,
        "weight_decay": options.weight_decay,
        "busy_processes": options.busy,
        "chunk_elements": CHUNK_ELEMENTS,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        **compare(sizes, options.steps, options.weight_decay, options.busy),
    }
    theirs, ours = report["torch_adamax_median_seconds"], report["host_adamax_median_seconds"]
    print(
        f"parameters: {sum(sizes):,}, tensors: {len(sizes):,}, threads: {options.threads}, beside: {options.busy} busy"
    )
    print(f"torch.optim.Adamax {theirs * 1e3:9.1f} ms    median of {options.steps} steps")
    print(f"HostAdamax         {ours * 1e3:9.1f} ms    {report['ratio_of_medians']:.2f} times as fast")
    print(f"largest difference between the two results: {report['largest_difference']:.1e}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
