"""Fine-tuning against training from scratch: held-out -ELBO on another style of faces at equal steps, and CPU seconds.

    python launch/train.py --profile demo-faces --runs-dir runs      # what is fine-tuned, or any run on `faces`
    python benchmarks/fine_tuning.py --run runs/00000-demo-faces --out benchmarks/results/fine-tuning.json

The run was trained on two styles of faces; all trainings here are on the third one, `open-peeps`, from the same images
in the same order, with the same noise on held-out ones. Also the predicted memory with the encoder frozen.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from nvae_lowmem.commands.train import main as train
from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.memory.predict.predict import predict
from nvae_lowmem.units import format_bytes

ENCODER = ("stem", "pre_*", "enc_*", "top")
RATE = 0.01  # of demo-faces, for random weights
VARIANTS: dict[str, list[str]] = {
    "from scratch": ["--profile", "demo-faces"],
    "fine-tuned": ["--init-from", "RUN"],
    "fine-tuned at 0.3 of the rate": ["--init-from", "RUN", "--set", f"training.learning_rate={0.3 * RATE:g}"],
    "fine-tuned at the whole rate": ["--init-from", "RUN", "--set", f"training.learning_rate={RATE:g}"],
    "fine-tuned, encoder frozen": ["--init-from", "RUN", "--freeze", *ENCODER],
    "fine-tuned, encoder frozen, its statistics estimated": [
        *("--init-from", "RUN", "--freeze", *ENCODER, "--set", "training.init_statistics=estimate")
    ],
}
PREDICTED = ("demo-faces", "gtx-970-celeba64")


def trained(name: str, arguments: list[str], run: str, steps: int, images: int, runs_dir: Path) -> dict[str, object]:
    """Train one variant; its held-out nats by step, its bits/dim at the end, and CPU seconds."""
    folder = runs_dir / name.replace(" ", "-").replace(",", "")
    shared = ["data.faces_style=open-peeps", f"data.faces_count={images}", f"training.evaluate_every={steps // 8}"]
    shared += [f"training.sample_every={steps}", f"training.save_every={steps}"]
    given = [run if argument == "RUN" else argument for argument in arguments]
    began = time.process_time()
    code = train([*given, "--run-dir", str(folder), "--steps", str(steps), "--device", "cpu", "--set", *shared])
    assert code == 0, name
    seconds = time.process_time() - began
    records = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    found = {record["step"]: record for record in records if "val/nelbo" in record}
    return {
        "nelbo": {step: round(record["val/nelbo"], 1) for step, record in found.items()},
        "bits_per_dim": round(found[steps]["val/bpd_elbo"], 4),
        "cpu_seconds": round(seconds),
    }


def memory(name: str) -> dict[str, int]:
    """Predicted bytes of a shipped profile under its own plan, without and with its encoder frozen."""
    whole = profiles.load(name)
    frozen = replace(whole, training=replace(whole.training, freeze=ENCODER))
    found = {}
    for what, profile in (("", whole), ("frozen_", frozen)):
        micro_batch = profile.micro_batch()
        prediction = predict(profile.with_plan(cap_bytes=0), micro_batch, profile.training.total_batch // micro_batch)
        found[f"{what}card_bytes"] = prediction.allocated_peak_bytes
        found[f"{what}host_bytes"] = prediction.host_bytes
    return found


def main() -> None:
    """Train all variants, predict, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run on faces of the mixed styles")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/fine-tuning"))
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=[*VARIANTS], help="some of the trainings")
    parser.add_argument("--out", type=Path, help="JSON file; trainings that it has already stay in it")
    options = parser.parse_args()
    predicted = {name: memory(name) for name in PREDICTED}
    for name, figures in predicted.items():
        print(name, {what: format_bytes(nbytes) for what, nbytes in figures.items()}, flush=True)
    known = options.out is not None and options.out.is_file()
    results = json.loads(options.out.read_text())["trainings"] if known else {}
    for name in options.only:
        results[name] = trained(name, VARIANTS[name], options.run, options.steps, options.images, options.runs_dir)
        print(f"RESULT {name}: {results[name]}", flush=True)
        if options.out is not None:
            table = {"steps": options.steps, "images": options.images, "trainings": results, "predicted": predicted}
            options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
