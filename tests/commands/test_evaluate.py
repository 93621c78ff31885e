"""`launch/evaluate.py`: figures and a page of a run, with and without samples; bad input is one message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation_runs import TINY, blobs, needs_torchmetrics, perturbed, write_run
from PIL import Image

from launch.evaluate import main
from nvae_lowmem.evaluation import distances


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained network on a folder of pictures."""
    root = tmp_path_factory.mktemp("evaluation")
    model = replace(TINY, image_size=8, padding=0, bits=8, mixtures=2)
    for name, count in (("train", 12), ("test", 12)):
        (root / name).mkdir()
        for i, picture in enumerate((blobs(count, 3, size=8)[:, 0] * 255).to(torch.uint8).numpy()):
            Image.fromarray(picture).save(root / name / f"{i:02d}.png")
    folders = {"source": "train", "test_source": "test", "cache_dir": "cache"}
    return write_run(root / "run", perturbed(model), **{key: str(root / name) for key, name in folders.items()})


def arguments(run_dir: Path, *more: str) -> Sequence[str]:
    return [
        "--run",
        str(run_dir),
        "--device",
        "cpu",
        "--images",
        "10",
        "--iw-samples",
        "3",
        "--micro-batch",
        "8",
        *more,
    ]


@needs_torchmetrics
def test_command_writes_figures_and_a_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(run_dir, "--samples", "10")) == 0
    table = json.loads((run_dir / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert (table["images"], table["importance_weighted_bound"]["draws"]) == (10, 3)
    assert [d["images"] for d in table["distances"]] == [[10, 10], [10, 10], [5, 5]]
    page = (run_dir / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4  # KL of groups, images, reconstructions, samples
    assert "samples at temperature 1.0, means of p(x|z)" in page  # the draws, which KID compares, have pixel noise
    assert "samples at temperature 1.0, sample of p(x|z)" in json.dumps(table["distances"])
    assert "-ELBO" in capsys.readouterr().out


def test_command_without_samples_prints_json_and_nothing_else(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(run_dir, "--samples", "0", "--json", "-", "--out", str(tmp_path))) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["distances"] == [] and table["negative_elbo"]["nats"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_without_torchmetrics_the_extra_is_named_and_the_rest_is_done(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distances, "available", lambda: False)
    assert main(arguments(run_dir, "--samples", "8", "--out", str(tmp_path))) == 0
    assert "pip install torchmetrics" in capsys.readouterr().out
    table = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert table["distances"] == [] and "metrics" in table["notes"][0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--iw-samples", "0"], "--iw-samples 0: must be at least 1"),
        (["--images", "-1"], "--images -1"),
        (["--samples", "3"], "--samples 3"),
        (["--micro-batch", "-1"], "--micro-batch -1"),
        (["--temperature", "hot"], "--temperature hot"),
        (["--temperature", "0.7,0.8,0.9"], "3 temperatures for a model of 2 scales"),
        (["--fid-weights", "no/such/file.pt"], "--fid-weights no/such/file.pt"),
        (["--fid-weights", "x.pt", "--samples", "0"], "--samples is 0"),
        (["--run", "no-such-run"], "--run no-such-run"),
        (["--images", "4"], "at least 8 held-out images, not 4"),
        (["--json", "."], "is a folder"),
    ],
)
@needs_torchmetrics
def test_bad_input_ends_in_one_message_and_exit_code_2(
    run_dir: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(run_dir, "--samples", "10", "--runs-dir", str(tmp_path), "--out", str(tmp_path), *more)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
