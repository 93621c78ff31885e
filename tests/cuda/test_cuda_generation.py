"""Commands on a trained run, and the demo page's state, on a card and within the run's cap."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from card_runs import CAP_BYTES, run, run_folder, train, write_profile

from nvae_lowmem.commands import blend, evaluate, reconstruct, sample, traverse
from nvae_lowmem.demo.state import DemoState, Report
from nvae_lowmem.training.open_run import open_run

pytestmark = pytest.mark.cuda

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], tuple[str, ...], str]] = {
    "sample": (sample.main, ("--temperatures", "0.7", "1.0"), "samples/generated-t1.0.png"),
    "reconstruct": (reconstruct.main, (), "samples/reconstructions.png"),
    "blend": (blend.main, ("--matrix", "3"), "samples/blend-linear-held-out-0-held-out-1-matrix.png"),
    "traverse": (traverse.main, (), "samples/traverse-held-out-0.png"),
    "evaluate": (evaluate.main, ("--images", "8", "--iw-samples", "2", "--samples", "8"), "evaluation/evaluation.json"),
    "evaluate in fp16": (
        evaluate.main,
        ("--images", "8", "--iw-samples", "2", "--samples", "0", "--precision", "fp16"),
        "evaluation/evaluation.json",
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a plan with a cap, in fp16."""
    profile = write_profile(
        tmp_path_factory.mktemp("trained"), f"plan.cap_bytes = {CAP_BYTES}", 'plan.precision = "fp16"'
    )
    done = train(profile)
    assert done.code == 0, done.complained
    return run_folder(profile)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_on_the_card(name: str, trained: Path) -> None:
    main, arguments, written = COMMANDS[name]
    (trained / written).unlink(missing_ok=True)
    done = run(main, "--run", trained, *arguments)
    assert done.code == 0, done.complained
    assert "on cuda:0" in done.said + done.complained
    assert (trained / written).stat().st_size > 0
    with pytest.raises(torch.cuda.OutOfMemoryError):  # the plan's cap is in force
        torch.empty(CAP_BYTES + 1, dtype=torch.uint8, device="cuda")


def test_fp32_takes_half_the_images_that_a_plan_for_fp16_has_room_for(trained: Path) -> None:
    assert open_run(str(trained), "").micro_batch == 2
    assert open_run(str(trained), "", precision="fp16").micro_batch == 4


def test_evaluation_writes_figures(trained: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = run(
        evaluate.main, "--run", trained, "--images", "8", "--iw-samples", "2", "--samples", "0", "--json", figures
    )
    assert done.code == 0, done.complained
    assert json.loads(figures.read_text())


def test_the_demo_page_shows_what_its_sliders_ask_for(trained: Path, tmp_path: Path) -> None:
    state = DemoState(open_run(str(trained), ""), tmp_path)
    assert state.run.device == torch.device("cuda", 0) and not state.data_problem
    quiet: Report = lambda _: lambda *_: None  # noqa: E731
    assert state.sample([0.8], seed=1, count=4, report=quiet).size > 0
    assert len(state.blend(state.examples[:2], [0.5], "linear", quiet)) == 3
    assert state.traverse(state.examples[0], group=0, channels=1, sigmas=2.0, steps=3, report=quiet).size > 0
