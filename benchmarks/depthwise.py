"""The weight gradient of depthwise convolutions on the CPU: by groups (ours) against oneDNN's own, shape by shape.

    python benchmarks/depthwise.py --recipe mnist --batch 8 --threads 1 --json depthwise.json

The shapes are those of the recipes' own networks: every convolution that takes the short cut in training, with how
often it occurs. The two ways take turns, so that other load on the machine falls on both; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import headline, machine, write_json
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_lowmem.config.recipes import RECIPES, recipe
from nvae_lowmem.hardware.cpu import keep_freed_memory
from nvae_lowmem.model.functional import aten, depthwise_weight_gradient
from nvae_lowmem.model.latents import FromPosterior, NoNoise
from nvae_lowmem.model.nvae import NVAE

DEFAULT_RECIPES = ("tiny", "mnist", "cifar10", "celeba64")


class Shape(NamedTuple):
    """A depthwise convolution with stride 1 that keeps the size: (B, channels, size, size), kernel x kernel."""

    channels: int
    kernel: int
    size: int


class DepthwiseShapes(TorchDispatchMode):
    """Counts the depthwise convolutions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution.default:
            x, w, _, stride, _, dilation, *_ = args
            # those for which model.functional.weight_gradient_by_groups holds on the CPU
            if w.shape[1] == 1 and w.shape[0] == x.shape[1] and w.shape[2] > 1 and set(stride) == set(dilation) == {1}:
                self.found[Shape(w.shape[0], w.shape[2], x.shape[2])] += 1
        return func(*args, **(kwargs or {}))


def shapes_of(name: str) -> Counter[Shape]:
    """The depthwise convolutions of a recipe's network, which is not filled with numbers for that."""
    config = recipe(name).model
    with FakeTensorMode(), torch.no_grad(), DepthwiseShapes() as watch:
        model = NVAE(config)
        x = torch.empty(1, config.image_channels, config.network_size, config.network_size)
        model.decode(FromPosterior(NoNoise()), model.encode(x))
    return watch.found


def compare(shape: Shape, batch: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both ways on random maps of this shape, and how far their results are apart."""
    generator = torch.Generator().manual_seed(0)
    size = (batch, shape.channels, shape.size, shape.size)
    a, g = (torch.randn(size, generator=generator) for _ in range(2))
    w = torch.randn((shape.channels, 1, shape.kernel, shape.kernel), generator=generator)
    padding = shape.kernel // 2

    def by_onednn() -> Tensor:
        p, one = [padding] * 2, [1, 1]
        mask = [False, True, False]
        return aten.convolution_backward(g, a, w, None, one, p, one, False, [0, 0], shape.channels, mask)[1]

    def by_groups() -> Tensor:
        return depthwise_weight_gradient(g, a, padding)

    ways: dict[str, Callable[[], Tensor]] = {"onednn": by_onednn, "groups": by_groups}
    reference, ours = (way() for way in ways.values())  # not timed: oneDNN makes its kernels in the first call
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **shape._asdict(),
        "onednn_seconds": median["onednn"],
        "groups_seconds": median["groups"],
        "ratio": median["onednn"] / median["groups"],
        "relative_difference": float((ours - reference).norm() / reference.norm()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="may be repeated; default: four of them")
    parser.add_argument("--batch", type=int, default=8, help="images per micro-batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, settings and every figure to FILE")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    about = machine(options.threads)
    print(headline(about))
    print(f"depthwise weight gradients, fp32, batch {options.batch}, median of {options.repeats}")
    print("recipe        channels  kernel  pixels  times     oneDNN  by groups    ratio  difference")
    measured: dict[Shape, dict[str, Any]] = {}
    recipes: dict[str, Any] = {}
    for name in options.recipe or DEFAULT_RECIPES:
        total = dict.fromkeys(("onednn_seconds", "groups_seconds"), 0.0)
        rows = []
        for shape, times in sorted(shapes_of(name).items()):
            if shape not in measured:
                measured[shape] = compare(shape, options.batch, options.repeats)
            row = measured[shape] | {"times": times}
            rows.append(row)
            total = {key: total[key] + times * row[key] for key in total}
            print(
                f"{name:<12} {shape.channels:>9} {shape.kernel:>7} {shape.size:>7} {times:>6} "
                f"{row['onednn_seconds'] * 1e3:>7.1f} ms {row['groups_seconds'] * 1e3:>7.1f} ms {row['ratio']:>8.2f}"
                f"  {row['relative_difference']:>10.1e}",
                flush=True,
            )
        recipes[name] = {"shapes": rows, **total, "ratio": total["onednn_seconds"] / total["groups_seconds"]}
        print(
            f"{name:<12} all together, per step {total['onednn_seconds'] * 1e3:>14.0f} ms "
            f"{total['groups_seconds'] * 1e3:>7.0f} ms {recipes[name]['ratio']:>8.2f}"
        )
    write_json(options.json, {**about, "batch": options.batch, "repeats": options.repeats, "recipes": recipes})


if __name__ == "__main__":
    main()
