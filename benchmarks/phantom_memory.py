"""Predicted against measured peaks of whole training runs on a phantom card.

The CUDA allocator is torch's own, kernels do nothing (tests/phantom/README.md). Every row is five steps of the training
command with validation, pictures and checkpoints in between.

    python benchmarks/phantom_memory.py --only 'tiny-*'     # measure these rows again, predict all, print the table
    python benchmarks/phantom_memory.py --predict           # measure nothing

Rows that the JSON file holds already are not measured again, so a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "phantom-memory-2026-11-25.json"
STEPS = 5
CONTEXT_BYTES, TOTAL_BYTES = 104_857_600, 4_233_035_776  # a GTX 970
AMPERE = ("--cc", "8.6", "--name", "NVIDIA GeForce RTX 3050 Laptop GPU")
WORKSPACE_MIB = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration."""

    name: str
    base: str
    """A shipped profile, or a recipe."""
    sets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Of phantom-run, beside the card's."""
    total_bytes: int = TOTAL_BYTES


# A model of colour images with flows and a mixture of logistics, and one without squeeze and excitation or residuals.
_RGB = (
    "model.image_channels=3", "model.image_size=32", "model.padding=0", "model.bits=8", "model.mixtures=5",
    "model.channels_encoder=24", "model.channels_decoder=24", "model.scales=3", "model.groups=4", "model.flows=1",
    "data.source='faces'", "data.faces_count=200", "training.total_batch=32",
)  # fmt: skip
_PLAIN = (
    "model.squeeze_excitation=false", "model.residual_posterior=false", "model.architecture='res_elu'",
    "model.data_init=true", "model.channels_encoder=32", "model.channels_decoder=32",
)  # fmt: skip


def _plan(**plan: Any) -> tuple[str, ...]:
    values = {key: f"'{v}'" if isinstance(v, str) else str(v).lower() for key, v in plan.items()}
    return tuple(f"plan.{key}={value}" for key, value in values.items())


def _zero(stage: int, precision: str, **plan: Any) -> tuple[str, ...]:
    return _plan(engine="deepspeed", zero_stage=stage, precision=precision, keep="cheap", **plan)


def rows() -> list[Row]:
    """All configurations."""
    out = [
        Row(
            f"tiny-{keep}-{precision}",
            "tiny",
            _plan(keep=keep, precision=precision),
            AMPERE if precision == "bf16" else (),
        )
        for keep in ("all", "cheap", "input", "host")
        for precision in ("fp32", "fp16", "bf16")
    ]
    half = {"precision": "fp16"}
    cheap, host = {**half, "keep": "cheap"}, {**half, "keep": "host", "offload_optimizer": True}
    expandable = {"allocator_settings": "expandable_segments:True"}
    small_copies = ("--copy-bytes", "65536")
    everything = {"offload_optimizer": True, "offload_parameters": True}
    out += [
        Row("tiny-accumulate", "tiny", _plan(**cheap, micro_batch=8)),
        Row("tiny-average-on-card", "tiny", (*_plan(**half), "training.ema_on_host=false")),
        Row("tiny-clipped", "tiny", (*_plan(**cheap), "training.clip_norm=1.0")),
        Row("tiny-offload", "tiny", _plan(**cheap, offload_optimizer=True)),
        Row("tiny-offload-pinned", "tiny", _plan(**host, pin_memory=True)),
        Row("plain-fp16", "tiny", (*_PLAIN, *_plan(**half, keep="all"))),
        Row("plain-expandable", "tiny", (*_PLAIN, *_plan(keep="cheap", precision="fp32", **expandable))),
        Row("rgb-all-fp16", "tiny", (*_RGB, *_plan(**half, keep="all"))),
        Row("rgb-cheap-bf16", "tiny", (*_RGB, *_plan(keep="cheap", precision="bf16")), AMPERE),
        Row("rgb-input-fp32", "tiny", (*_RGB, *_plan(keep="input", precision="fp32"))),
        Row("rgb-host-fp16", "tiny", (*_RGB, *_plan(**host))),
        Row("rgb-expandable", "tiny", (*_RGB, *_plan(**cheap, **expandable))),
        Row("rgb-max-split", "tiny", (*_RGB, *_plan(**half, keep="all", allocator_settings="max_split_size_mb:32"))),
        Row("rgb-2-gib-card", "tiny", (*_RGB, *_plan(**cheap)), total_bytes=2 << 30),
        Row("rgb-8-gib-card", "tiny", (*_RGB, *_plan(keep="all", precision="bf16")), AMPERE, 8 << 30),
        Row("rgb-cap-768-mib", "tiny", (*_RGB, *_plan(**cheap, cap_bytes=768 << 20))),
        Row("rgb-cap-2-gib", "tiny", (*_RGB, *_plan(keep="all", precision="fp32", cap_bytes=2 << 30))),
        Row("zero-0", "tiny", _zero(0, "fp32")),
        Row("zero-1", "tiny", _zero(1, "fp16")),
        Row("zero-1-offload", "tiny", _zero(1, "fp16", offload_optimizer=True)),
        Row("zero-2", "tiny", _zero(2, "fp32")),
        Row("zero-2-offload", "tiny", _zero(2, "fp16", offload_optimizer=True)),
        Row("zero-2-accumulate", "tiny", _zero(2, "fp16", offload_optimizer=True, micro_batch=8)),
        Row("zero-3", "tiny", _zero(3, "fp16"), ("--copy-bytes", str(64 << 20))),
        Row("zero-3-offload", "tiny", _zero(3, "fp16", **everything), small_copies),
        Row("mnist-zero-2-offload", "mnist", _zero(2, "fp16", offload_optimizer=True, micro_batch=50)),
    ]
    faces = ("data.source='faces'", "data.faces_count=200")
    for name in ("mnist", "cifar10", "celeba64", "imagenet32", "celebahq256", "ffhq256"):
        out.append(Row(f"gtx-970-{name}", f"gtx-970-{name}", () if name == "mnist" else faces))
    return out


# --- in the measured process ------------------------------------------------------------------------------------------


def measure_here(out: Path, arguments: list[str]) -> int:
    """Train in this process, then write what the allocator says of it."""
    import torch

    from nvae_lowmem.commands import train
    from nvae_lowmem.training import alarms, checkpoint_files

    # Nothing is computed, so what stale memory holds is no reason for an alarm, nor for not saving.
    alarms.Alarms.look = lambda *_: []  # type: ignore[method-assign]
    checkpoint_files.not_finite = lambda _: []
    code = train.main(arguments)
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    reserved = stats["reserved_bytes.all.current"]
    out.write_text(
        json.dumps(
            {
                "code": code,
                "allocated_bytes": stats["allocated_bytes.all.peak"],
                "requested_bytes": stats["requested_bytes.all.peak"],
                "reserved_bytes": stats["reserved_bytes.all.peak"],
                "retries": stats["num_alloc_retries"],
                "ooms": stats["num_ooms"],
                "outside_bytes": total - free - reserved,
                "torch": str(torch.__version__),
            }
        )
    )
    return code


# --- rows -------------------------------------------------------------------------------------------------------------


def profile_of(row: Row) -> Any:
    """The profile that the row trains."""
    from nvae_lowmem.config import profile_file as profiles
    from nvae_lowmem.config.recipes import RECIPES, recipe

    base = recipe(row.base) if row.base in RECIPES else profiles.load(row.base)
    profile = profiles.override(base, list(row.sets))
    micro, total = profile.plan.micro_batch, profile.training.total_batch
    often = [f"training.{name}_every=2" for name in ("evaluate", "sample", "save")]
    batches = [f"training.evaluate_images={2 * (micro or total)}"]
    if profile.plan.cap_bytes and micro:  # of a shipped plan, two micro-batches show all that many do
        batches.append(f"training.total_batch={min(total, 2 * micro)}")
    return profiles.override(profile, [*often, *batches, "training.log_every=1"])


def fingerprint(row: Row) -> str:
    """Tells the row's profile from another, such as the same shipped plan fitted anew."""
    from nvae_lowmem.config import profile_file as profiles

    table = profiles.to_dict(profile_of(row))
    table.pop("provenance", None)
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:12]


def measure(row: Row, launcher: list[str], workspace_mib: int) -> dict[str, Any]:
    """The row's run on the phantom; its figures in bytes, or why there are none."""
    from nvae_lowmem.config import profile_file as profiles

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        profile, out = Path(folder) / "profile.toml", Path(folder) / "out.json"
        profiles.save(profile_of(row), profile)
        card = ["--total", str(row.total_bytes), "--context", str(CONTEXT_BYTES), "--cc", "5.2", *row.flags]
        card += ["--workspace-mib", str(workspace_mib)] if workspace_mib else []
        training = ["--profile", str(profile), "--steps", str(STEPS), "--runs-dir", folder]
        command = [*launcher[:-1], *card, "--", launcher[-1], __file__, "--measure-here", str(out), *training]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            return {"code": done.returncode, "error": (done.stderr or done.stdout).strip().splitlines()[-1][:300]}
        return {**json.loads(out.read_text()), "seconds": round(time.monotonic() - began, 1)}


def predicted(row: Row) -> dict[str, Any]:
    """What is predicted of the row."""
    from nvae_lowmem.hardware.budget import Budget, find_card
    from nvae_lowmem.memory.predict.predict import predict
    from nvae_lowmem.training.resolve import split_batch

    profile = profile_of(row)
    split = split_batch(profile, 1)
    card = find_card("rtx-3050-laptop" if "8.6" in row.flags else "gtx-970")
    cap = profile.plan.cap_bytes
    budget = None
    if cap:
        budget = Budget(cap_bytes=cap, total_bytes=row.total_bytes, context_bytes=CONTEXT_BYTES, reason="the row's cap")
    p = predict(profile, split.micro, split.accumulation, card, budget)
    return {
        "allocated_bytes": p.allocated_peak_bytes,
        "reserved_bytes": p.reserved_peak_bytes,
        "margin_bytes": p.margin_bytes,
        "init_bytes": p.init_peak_bytes,
        "retries": p.retries,
        "run_retries": p.run_retries,
        "fits": p.oom is None if cap else True,
        "oom": p.oom,
    }


def main() -> int:
    """The command."""
    if "--measure-here" in sys.argv:
        at = sys.argv.index("--measure-here")
        return measure_here(Path(sys.argv[at + 1]), sys.argv[at + 2 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="rows by name, with * and ?")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--again", action="store_true", help="measure rows again that the file holds")
    parser.add_argument("--workspaces", action="store_true", help=f"with {WORKSPACE_MIB} MiB at every convolution")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--launcher", nargs="*", default=["tests/phantom/phantom-run", ".venv-cuda/bin/python"])
    parser.add_argument("--table", action="store_true", help="print the file as a table, and do nothing else")
    args = parser.parse_args()
    report = json.loads(args.json.read_text()) if args.json.exists() else {"rows": {}}
    if args.table:
        print(table(report))
        return 0
    key = "measured_with_workspaces" if args.workspaces else "measured"
    for row in rows():
        if not any(fnmatch.fnmatch(row.name, pattern) for pattern in args.only):
            continue
        entry = report["rows"].setdefault(row.name, {})
        entry |= {"base": row.base, "sets": list(row.sets), "flags": list(row.flags), "total_bytes": row.total_bytes}
        known = entry.get(key, {})
        measured = known.get("allocated_bytes") and known.get("profile") == fingerprint(row)
        if not args.predict and (args.again or not measured):
            workspace_mib = WORKSPACE_MIB if args.workspaces else 0
            entry[key] = {"profile": fingerprint(row)} | measure(row, args.launcher, workspace_mib)
            entry[key]["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        if args.predict:
            began = time.monotonic()
            entry["predicted"] = predicted(row)
            entry["predicted"]["seconds"] = round(time.monotonic() - began, 1)
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(_line(row.name, entry), flush=True)
    return 0


def table(report: dict[str, Any]) -> str:
    """The rows that are both measured and predicted, as docs/performance.md has them."""
    lines = ["| run | allocated | error | reserved | error | margin |", "|---|---|---|---|---|---|"]
    for name, entry in report["rows"].items():
        m, p = entry.get("measured", {}), entry.get("predicted", {})
        if not (m.get("allocated_bytes") and p):
            continue
        cells = [name]
        for kind in ("allocated", "reserved"):
            difference = p[f"{kind}_bytes"] - m[f"{kind}_bytes"]
            exact = f"{difference:+,} B" if abs(difference) < 1000 else f"{difference / m[f'{kind}_bytes']:+.2%}"
            cells += [f"{m[f'{kind}_bytes'] / 2**20:,.1f} MiB", exact if difference else "0"]
        lines.append(f"| {' | '.join(cells)} | {p['margin_bytes'] / 2**20:.0f} MiB |")
    return "\n".join(lines)


def _percent(entry: dict[str, Any], key: str, kind: str) -> str:
    have, want = entry.get(key, {}).get(f"{kind}_bytes"), entry.get("predicted", {}).get(f"{kind}_bytes")
    return f"{100 * (want / have - 1):+7.2f}" if have and want else "      -"


def _line(name: str, entry: dict[str, Any]) -> str:
    m, w, p = (entry.get(key, {}) for key in ("measured", "measured_with_workspaces", "predicted"))
    cells = [f"{name:24}"]
    for kind in ("allocated", "reserved"):
        cells += [f"{m.get(f'{kind}_bytes', 0):>11}", _percent(entry, "measured", kind)]
    cells.append(f"{m.get('retries', '-')} retries, {p.get('run_retries', '-')} predicted")
    if "allocated_bytes" in w and p:
        over = max(w[f"{kind}_bytes"] - p[f"{kind}_bytes"] for kind in ("allocated", "reserved"))
        cells.append(f"| with workspaces {over:+} of {p['margin_bytes']}, {w['retries']} retries")
    return " ".join([*cells, *(e["error"][-200:] for e in (m, w) if "error" in e)])


if __name__ == "__main__":
    sys.exit(main())
