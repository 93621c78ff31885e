"""The fitting command: its flags, its files, its exit statuses."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from planner_cases import GIB, WIDE, profile_of, small_model

from nvae_lowmem.commands.fit_memory import main
from nvae_lowmem.config.profile_file import load, save
from nvae_lowmem.config.sections import MemoryPlan
from nvae_lowmem.memory.plan.duration import format_speed

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "fit_memory.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_memory_tool", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = small_model(groups=2, cells_encoder=1, cells_decoder=1)
    save(replace(profile_of(model), plan=MemoryPlan()), tmp_path / "small.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


JSON_KEYS = (
    "recipe fits card cap_bytes micro_batch accumulation total_batch groups_per_scale precision engine zero_stage "
    "peak_allocated_bytes peak_reserved_bytes allocator_retries host_bytes seconds_per_step images_per_second "
    "training_seconds speed_measured_on reasons frontier plan"
).split()


def test_the_command_writes_a_profile_that_trains_and_says_why(
    tool: ModuleType, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "--profile small.toml --card gtx-970 --os linux --total-batch 8 --json answer.json --picture step.html"
    assert tool.main(asked.split()) == 0
    shown = capsys.readouterr().out
    assert "total batch 8 = micro-batch" in shown and "images/s" in shown
    answer = json.loads((here / "answer.json").read_text())
    assert list(answer) == JSON_KEYS
    assert answer["fits"] and answer["cap_bytes"] == int(3.2 * GIB) and answer["zero_stage"] is None
    assert answer["card"]["id"] == "gtx-970" and "host memory" in shown
    least, most = answer["images_per_second"]
    assert 4 * least < most and f"{format_speed(least)} to {format_speed(most)} images/s (estimated" in shown
    (row,) = [row for row in answer["frontier"] if row["is_answer"]]
    assert (row["groups"], row["micro_batch"]) == (answer["groups_per_scale"], answer["micro_batch"])
    assert row["peak_bytes"] == answer["peak_reserved_bytes"] and row["images_per_second"] == [least, most]
    assert [line for line in shown.splitlines() if line.endswith("<- this plan")]
    planned = load(here / "small-gtx-970.toml")
    assert planned.plan.micro_batch == answer["micro_batch"]
    assert planned.plan.cap_bytes == answer["cap_bytes"]
    assert planned.training.total_batch == 8
    assert planned.provenance["card"] == "gtx-970"
    page = (here / "step.html").read_text()
    assert "Plotly.newPlot" in page and "cap 3.20 GiB" in page
    assert "<script src=" not in page and "<link" not in page  # nothing to fetch


def test_json_to_the_screen_is_json_alone_and_the_picture_may_be_a_png(
    tool: ModuleType, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "--profile small.toml --gpu-mem 4G --os linux --json - --out plan.toml --picture step.png"
    assert tool.main(asked.split()) == 0
    assert list(json.loads(capsys.readouterr().out)) == JSON_KEYS
    assert (here / "step.png").read_bytes().startswith(b"\x89PNG")
    assert load(here / "plan.toml").plan.precision == "fp16"


def test_nothing_fits_is_exit_status_three_with_the_nearest_miss(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(WIDE, here / "wide.toml")
    asked = "--profile wide.toml --gpu-mem 512M --os linux --groups 4 --json answer.json --picture step.png"
    assert main([*asked.split(), "--set", "plan.precision=fp32"]) == 3
    shown = capsys.readouterr().out
    assert "nearest miss" in shown and "<- the nearest" in shown
    answer = json.loads((here / "answer.json").read_text())
    assert not answer["fits"] and answer["peak_reserved_bytes"] > answer["cap_bytes"]
    assert not (here / "step.png").exists() and not list(here.glob("wide-*.toml"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", "--card NAME"),
        ("--gpu-mem 4X", "--gpu-mem '4X'"),
        ("--gpu-mem 0", "--gpu-mem '0' must be larger than zero"),
        ("--gpu-mem -3G", "--gpu-mem '-3G'"),
        ("--gpu-mem 900G", "no card has that"),
        ("--gpu-mem 4096", "did you mean --gpu-mem 4096M?"),
        ("--gpu-mem 4G --host-mem 16", "did you mean --host-mem 16G?"),
        ("--card RTX-4090", "--card auto"),
        ("--card gtx-970 --gpu-mem 12G", "more than a NVIDIA GeForce GTX 970 has"),
        ("--card gtx-97", "did you mean 'gtx-970'"),
        ("--card own.toml", "is missing"),
        ("--gpu-mem 4G --host-mem much", "--host-mem 'much'"),
        ("--gpu-mem 4G --groups many", "--groups 'many'"),
        ("--gpu-mem 4G --groups 3..1", "--groups 3..1"),
        ("--gpu-mem 4G --min-micro-batch 99", "--min-micro-batch 99"),
        ("--gpu-mem 4G --total-batch 0", "--total-batch 0"),
        ("--gpu-mem 4G --out nowhere/plan.toml", "--out nowhere/plan.toml"),
        ("--gpu-mem 4G --json .", "--json ."),
        ("--gpu-mem 4G --picture step.gif", "--picture step.gif"),
        ("--gpu-mem 4G --set model.groupz=1", "groupz"),
        ("--gpu-mem 4G --calibration nowhere.toml", "calibration file nowhere.toml"),
        ("--gpu-mem 4G --set plan.precision=bf16", "bf16"),
    ],
)
def test_bad_input_is_one_message_and_exit_status_two(
    asked: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.toml").write_text('name = "mine"\n')
    assert main(["--profile", "small.toml", *asked.split()]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert captured.err.count("fit_memory.py:") == 1
    assert sorted(path.name for path in here.iterdir()) == ["own.toml", "small.toml"]


def test_a_file_that_may_not_be_written_is_said_so_before_the_work_begins(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # permissions do not bind an administrator
    assert main("--profile small.toml --gpu-mem 4G --out plan.toml".split()) == 2
    captured = capsys.readouterr()
    assert "--out plan.toml cannot be written" in captured.err and "pricing" not in captured.err


def test_what_was_measured_on_the_card_takes_the_place_of_the_margin(here: Path) -> None:
    (here / "measured.toml").write_text("[cudnn-workspace]\nnbytes = 0\n[reductions]\nnbytes = 0\n")
    asked = "--profile small.toml --gpu-mem 4G --os linux --out"
    assert main([*asked.split(), "bounds.toml"]) == 0
    assert main([*asked.split(), "measured-plan.toml", "--calibration", "measured.toml"]) == 0
    bounds, measured = (load(here / f"{name}.toml").provenance["margin_bytes"] for name in ("bounds", "measured-plan"))
    assert bounds > 0 and measured == 0


def test_a_card_that_is_not_there_is_said_so(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--profile", "small.toml", "--card", "auto"]) == 2
    assert "cannot be read" in capsys.readouterr().err
