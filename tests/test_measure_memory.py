"""Measuring: a real child on the CPU, children that die, a card played by the simulator, and the command."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recording import CPU, WORKSPACE_BYTES, FakeCuda, watched
from test_trace import NANO, profile_of

from nvae_lowmem import profile as profiles
from nvae_lowmem.config import ModelConfig, Profile
from nvae_lowmem.memory import allocator_replay, measure_child, measure_command
from nvae_lowmem.memory import measure as measuring
from nvae_lowmem.memory.allocator_segments import Block
from nvae_lowmem.memory.cards import detect_card, find_card
from nvae_lowmem.memory.measure import Ended, Job, Outcome, measure, run_process
from nvae_lowmem.memory.measure_assess import assess, described
from nvae_lowmem.memory.measure_child import about_machine, synthetic_images
from nvae_lowmem.memory.measure_compare import compared, matched
from nvae_lowmem.memory.measure_convolutions import ConvolutionWatcher, largest_bytes, workspaces
from nvae_lowmem.memory.measure_report import as_table, as_text
from nvae_lowmem.memory.recording import Place, Recording
from nvae_lowmem.memory.trace import trace_training
from nvae_lowmem.training.distributed import deepspeed_available
from nvae_lowmem.training.setup import plan_run
from nvae_lowmem.units import GIB, MIB

CAP_BYTES = GIB


def nano(micro_batch: int = 2, total_batch: int = 4, **plan: Any) -> Profile:
    base = profile_of(NANO, micro_batch=micro_batch, **{"keep": "input", "precision": "fp16", **plan})
    return replace(base, name="nano", training=replace(base.training, total_batch=total_batch))


# --- a real child on the CPU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    profile = nano(offload_optimizer=True)
    return measure(Job(name="nano", profile=profile, device="cpu"), tmp_path_factory.mktemp("job"))


def test_a_real_run_on_the_cpu_is_what_was_predicted(on_cpu: Outcome) -> None:
    assert (on_cpu.status, on_cpu.detail, on_cpu.ended.code) == ("ok", "", 0)
    row = assess(on_cpu)
    assert row["agrees"] and row["stream"]["same_order"] and row["stream"]["unmatched"] == []
    assert row["stream"]["recorded"] == row["stream"]["expected"] > 1000
    for kind in ("allocated", "reserved", "host"):
        assert row["peaks"][kind]["error_percent"] == 0 and row["peaks"][kind]["measured"] > 0
    assert row["images_per_second"] == pytest.approx(4 / row["seconds_per_step"])
    assert (row["micro_batch"], row["accumulation"], row["engine"]) == (2, 2, "torch")
    measured = row["measured"]
    assert len(measured["seconds"]) == 3
    assert measured["versions"]["torch"] == str(torch.__version__) and measured["device"]["name"] == "cpu"
    json.dumps(row)
    text = as_text(row)
    assert "as predicted" in text and "one by one" in text
    assert "nano" in as_table([row, row]).splitlines()[2]


def test_a_run_that_takes_more_than_predicted_is_told(on_cpu: Outcome) -> None:
    more = {kind: 10 * nbytes + 100 * MIB for kind, nbytes in on_cpu.result["peaks"].items()}
    row = assess(replace(on_cpu, result={**on_cpu.result, "peaks": more}))
    assert not row["agrees"] and row["peaks"]["allocated"]["error_percent"] < -90
    assert "MORE THAN THE MARGIN" in as_text(row) and "EXCEEDED" in as_text(row)
    assert measure_command._exit_status([row]) == 3


# --- children that do not come to an end ------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, timeout_seconds: float = 60.0) -> Outcome:
    monkeypatch.setattr(measuring, "child_command", lambda _: python(code))
    return measure(Job(name="n", profile=nano(), device="cpu", timeout_seconds=timeout_seconds), folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_child_that_is_killed_is_told_with_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys; print('@step 2', flush=True)\n"
        "print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    )
    outcome = failing(monkeypatch, tmp_path, code)
    assert outcome.status == "failed" and outcome.ended == Ended(-9, "step 2", ("last words",))
    assert "killed by SIGKILL in step 2" in outcome.detail and "host memory" in outcome.detail
    row = assess(outcome)
    assert "SIGKILL" in as_text(row) and "last words" in as_text(row) and "SIGKILL" in as_table([row])
    assert measure_command._exit_status([row]) == 1


def is_gone(pid: int, patience_seconds: float = 20.0) -> bool:
    """Whether the process ends; a zombie has, though nobody has asked for its exit status."""
    status = Path(f"/proc/{pid}/stat")
    give_up = time.monotonic() + patience_seconds
    while time.monotonic() < give_up:
        try:
            if status.read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_child_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess, sys, time; print('@step 1', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "sys.stderr.write(str(child.pid)); sys.stderr.flush(); time.sleep(600)"
    )
    outcome = failing(monkeypatch, tmp_path, code, timeout_seconds=1.5)
    assert outcome.ended.code is None and "timeout of 1.5 s in step 1" in outcome.detail
    if sys.platform.startswith("linux"):
        assert is_gone(int(outcome.ended.stderr[-1]))


def test_a_child_that_breaks_is_told_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = failing(monkeypatch, tmp_path, "[print(i, file=__import__('sys').stderr) for i in range(99)]; 1 / 0")
    assert outcome.detail == "ended with exit code 1 in the start"
    assert len(outcome.ended.stderr) == 12 and "ZeroDivisionError" in outcome.ended.stderr[-1]


def test_a_child_sees_the_package_of_this_checkout(tmp_path: Path) -> None:
    code = "import nvae_lowmem.units as u, sys; sys.stderr.write(u.__file__)"
    ended = run_process(python(code), 60.0, tmp_path)
    assert Path(ended.stderr[0]).parent.parent == Path(measuring.__file__).parents[2]


@pytest.mark.skipif(not deepspeed_available()[0], reason="DeepSpeed is not installed")
def test_the_cpu_refuses_deepspeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles.save(nano(engine="deepspeed"), tmp_path / measure_child.PROFILE)
    (tmp_path / measure_child.JOB).write_text(json.dumps({"name": "n", "device": "cpu", "steps": 3}))
    assert measure_child.main([str(tmp_path)]) == 2
    assert "--set plan.engine=torch" in capsys.readouterr().err


# --- a card played by the simulator -----------------------------------------------------------------------------------


def played(profile: Profile, steps: int = 3, leak_bytes: int = 0) -> tuple[Recording, dict[str, Any]]:
    """The traced steps asked of a pretended card: (recording, the child's result)."""
    cuda = FakeCuda(CAP_BYTES)
    monitor = watched(cuda)
    cuda.malloc(WORKSPACE_BYTES)  # the backward thread's
    accumulation = profile.training.total_batch // profile.plan.micro_batch
    trace = trace_training(profile, profile.plan.micro_batch, accumulation, steps)
    ends = {at: name for name, at in trace.marks.items()}
    blocks: dict[int, Block] = {}
    phase = ""
    for i, event in enumerate(trace.events):
        if i in ends:
            monitor.checkpoint(ends[i])
        a = trace.allocations[event if event >= 0 else ~event]
        if a.category == "host":
            continue
        if event < 0:
            cuda.free(blocks.pop(~event))
            continue
        if a.phase != phase:
            phase = a.phase
            monitor.phase(phase)
        blocks[event] = cuda.malloc(a.nbytes)
        if "convolution" in a.operation:
            cuda.free(cuda.malloc(3 * MIB + 1))
    if leak_bytes:
        cuda.malloc(leak_bytes)
    monitor.checkpoint("end")
    result = {
        "status": "ok", "settings": "", "accumulation": accumulation, "seconds": [2.0, 0.5, 0.25], "overflows": 0,
        "host_bytes": [MIB, 2 * MIB, 2 * MIB], "statistics": monitor.statistics(), **about_machine(CPU),
        "workspaces": [{"convolution": "c", "forward_bytes": 3 * MIB + 1, "input_gradient_bytes": 0,
                        "weight_gradient_bytes": None}],
    }  # fmt: skip
    return monitor.recording("nano", profile.plan, ""), result


@cache
def on_card(leak_bytes: int = 0) -> Outcome:
    profile = nano(total_batch=2, cap_bytes=CAP_BYTES, offload_optimizer=True)
    recording, result = played(profile, leak_bytes=leak_bytes)
    job = Job(name="nano", profile=profile, device="cuda")
    return Outcome(
        job=job, status="ok", ended=Ended(0, "step 3", ()), result=result, recording=recording, decided=profile
    )


def test_a_recorded_run_is_compared_in_all_three_ways() -> None:
    row = assess(on_card())
    assert row["replay"]["equal"] and row["replay"]["checkpoints"] == 4 and row["agrees"]
    assert row["cublas_kept_bytes"] == 2 * WORKSPACE_BYTES
    stream = row["stream"]
    assert not stream["same_order"] and stream["unknown_bytes"] == 0
    assert {(u["bytes"], u["what"]) for u in stream["unmatched"]} == {(3 * MIB + 1, "convolution workspace")}
    peaks = row["peaks"]
    assert peaks["within_margin"] and peaks["margin_bytes"] >= 64 * MIB
    assert peaks["allocated"]["measured"] - peaks["allocated"]["predicted"] in range(4 * MIB + 1)
    assert peaks["host"]["measured"] == 2 * MIB
    assert row["seconds_per_step"] == 0.375
    assert "replay" in as_text(row) and "equal" in as_table([row])


def test_what_neither_trace_nor_libraries_know_is_listed_first() -> None:
    row = assess(on_card(leak_bytes=200 * MIB))
    first = row["stream"]["unmatched"][0]
    assert (first["bytes"], first["recorded"], first["expected"], first["what"]) == (200 * MIB, 1, 0, "")
    assert row["stream"]["unknown_bytes"] == 200 * MIB and not row["agrees"]
    assert str(200 * MIB) in as_text(row)


def test_running_out_of_memory_agrees_only_where_it_was_predicted() -> None:
    outcome = replace(on_card(), status="out of memory", detail="in step 1: no room")
    assert not assess(outcome)["agrees"]
    assert outcome.decided is not None
    tight = replace(outcome.decided, plan=replace(outcome.decided.plan, cap_bytes=66 * MIB))
    row = assess(replace(outcome, decided=tight))
    assert row["agrees"] and "out of memory in step 1: no room, as predicted" in as_text(row)


def test_unmatched_sizes_know_which_side_has_more() -> None:
    def stream(sizes: Sequence[int]) -> Recording:
        return Recording("r", Place("", 1, 0, 0.0), [(n, i) for i, n in enumerate(sizes)], ((0, "forward"),), ())

    found = matched(stream([512, 512, 700, 900]), stream([512, 700, 800]), {900: "library"})
    assert [(u["bytes"], u["recorded"], u["expected"], u["what"]) for u in found["unmatched"]] == [
        (900, 1, 0, "library"),
        (800, 0, 1, ""),
        (512, 2, 1, ""),
    ]
    assert matched(stream([5, 6]), stream([5, 6]), {})["same_order"]


@pytest.mark.parametrize(("measured", "held"), [(110, True), (111, False)])
def test_the_margin_is_what_may_come_on_top(measured: int, held: bool) -> None:
    found = compared(
        {"allocated": 100, "reserved": 100, "host": 0}, {"allocated": measured, "reserved": 50, "host": 0}, 10
    )
    assert found["within_margin"] is held
    assert found["reserved"]["error_percent"] == pytest.approx(100.0)
    assert found["allocated"]["error_percent"] == pytest.approx(100 * (100 / measured - 1))
    assert found["host"]["error_percent"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_real_card_the_replay_is_equal(tmp_path: Path) -> None:
    outcome = measure(Job(name="nano", profile=nano(cap_bytes=CAP_BYTES), device="cuda"), tmp_path)
    row = assess(outcome, detect_card())
    assert row["replay"]["equal"], row["replay"]
    assert row["agrees"] and row["measured"]["workspaces"]


# --- pieces of the child ----------------------------------------------------------------------------------------------


class Notes:
    """A monitor that writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str) -> None:
        self.said.append(name)

    def checkpoint(self, name: str) -> None:
        self.said.append(f"[{name}]")

    def note_free(self, name: str) -> None: ...

    def now(self) -> float:
        return 0.0


def test_the_monitor_hears_every_phase_of_every_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_run(nano(offload_optimizer=False, precision="fp32"), 100, CPU, 1)
    notes, result = Notes(), {"seconds": [], "host_bytes": [], "overflows": 0}
    engine = measure_child._run(plan, "torch", CPU, notes, 1, result)
    assert engine is not None and len(result["seconds"]) == 1
    pass_ = ["forward", "forward", "backward"]  # the images belong to the forward pass
    assert notes.said == ["setup", "[setup done]", *pass_, *pass_, "update", "[step 1]"]
    assert "@step 1" in capsys.readouterr().out
    found = measure_child._convolutions(plan, engine, CPU, 1)
    assert len(found) > 5 and len(set(found)) == len(found)
    measured = workspaces(found, CPU, lambda run: int(run() is not None))
    assert len(measured) == len(found) and largest_bytes(measured) == 1
    assert all("groups" in row["convolution"] and row["input_gradient_bytes"] == 1 for row in measured)


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")

    monkeypatch.setattr(measure_child, "_step", full)
    result: dict[str, Any] = {"seconds": [], "host_bytes": [], "overflows": 0}
    assert measure_child._run(plan_run(nano(), 100, CPU, 1), "torch", CPU, Notes(), 3, result) is None
    assert result["status"] == "out of memory"
    assert result["detail"] == "in step 1: CUDA out of memory. Tried to allocate"


def test_each_convolution_is_noted_once_forward_or_backward() -> None:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    with ConvolutionWatcher() as watcher:
        for stride in (1, 1, 2):
            torch.nn.functional.conv2d(x, weight, stride=stride).sum().backward()
    assert [c.options[0] for c in watcher.found] == [(1, 1), (2, 2)]
    assert x.grad is not None and str(next(iter(watcher.found))).startswith("[2, 4, 6, 6] * [8, 4, 3, 3] float32")


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_synthetic_images_are_of_the_models_kind(bits: int) -> None:
    model = ModelConfig(image_size=12, padding=2, image_channels=1 if bits == 1 else 3, bits=bits)
    x = synthetic_images(model, 0, 0, 5, CPU)
    assert x.shape == (5, model.image_channels, 16, 16) and x.dtype == torch.float32
    levels = x * (2**bits - 1)
    assert torch.equal(levels, levels.round()) and 0 <= x.min() < x.max() <= 1
    assert torch.equal(x, synthetic_images(model, 0, 0, 5, CPU))
    assert not torch.equal(x, synthetic_images(model, 1, 0, 5, CPU))


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    path = Path(__file__).parent.parent / "tools" / "measure_memory.py"
    spec = importlib.util.spec_from_file_location("measure_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code: int = module.main(arguments)
    return code


def test_several_configurations_make_one_report_and_files_that_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Job] = []

    def pretend(job: Job, folder: Path) -> Outcome:
        jobs.append(job)
        outcome = on_card()
        assert outcome.recording is not None
        return replace(outcome, job=job, recording=replace(outcome.recording, name=job.name))

    monkeypatch.setattr(measure_command, "measure", pretend)
    monkeypatch.setattr(measure_command, "_card", lambda _: find_card("gtx-970"))
    file, out, report_file = tmp_path / "nano.toml", tmp_path / "out", tmp_path / "report.json"
    profiles.save(nano(), file)
    changes = ("--cap", "1G", "--set", "plan.keep=cheap", "--micro-batch", "1")
    code = command(
        "--profile", str(file), "--profile", str(file), *changes, "--out", str(out), "--json", str(report_file)
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert [job.name for job in jobs] == ["nano", "nano-2"]
    plans = [job.profile.plan for job in jobs]
    assert {(plan.cap_bytes, plan.keep, plan.micro_batch) for plan in plans} == {(GIB, "cheap", 1)}
    assert len(printed.out.splitlines()) == 2 + 2 and "2 of 2" in printed.err
    report = json.loads((out / "measurements.json").read_text())
    assert report == json.loads(report_file.read_text()) and len(report["runs"]) == 2
    assert {"date", "device", "versions", "card", "runs"} == report.keys()
    assert allocator_replay.main([str(out)]) == 0
    assert "2 traces, 8 checkpoints, mismatches: 0" in capsys.readouterr().out
    assert f"measured on {report['device']['name']}, torch" in (out / "calibration.toml").read_text()


def test_what_was_measured_can_be_compared_later_without_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_command, "measure", lambda job, folder: on_card())
    monkeypatch.setattr(measure_command, "_card", lambda _: find_card("gtx-970"))
    out = str(tmp_path / "out")
    assert command("--recipe", "tiny", "--no-compare", "--out", out) == 0
    assert "nano: measured" in capsys.readouterr().out
    monkeypatch.undo()
    assert command("--compare", out, "--json", "-") == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row == json.loads(json.dumps(assess(on_card(), find_card("gtx-970"))))
    assert "replay" not in described(on_card())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"card": null}', '{"card": null, "runs": [{"name": "a"}]}', "{]"])
def test_a_folder_of_another_kind_is_one_message(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--compare", str(tmp_path)) == 2
    (tmp_path / "measurements.json").write_text(text)
    assert command("--compare", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2 and "measurements.json cannot be read as what" in err


def test_the_command_measures_on_the_cpu(
    tmp_path: Path, on_cpu: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_command, "measure", lambda job, folder: on_cpu)
    assert command("--recipe", "tiny", "--device", "cpu", "--json", "-", "--out", str(tmp_path)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][0]["stream"]["same_order"]
    assert [path.name for path in tmp_path.iterdir()] == ["measurements.json"]  # nothing to replay or calibrate with


def test_the_matrix_spans_recipes_policies_precisions_sizes_and_engines() -> None:
    found = measure_command.matrix()
    assert len(found) >= 12 and len({name for name, _ in found}) == len(found)
    plans = [profile.plan for _, profile in found]
    assert len({profile.provenance["recipe"] for _, profile in found}) >= 6
    assert {plan.keep for plan in plans} == {"all", "cheap", "input", "host"}
    assert {plan.precision for plan in plans} >= {"auto", "fp16", "fp32"}
    assert {plan.engine for plan in plans} >= {"torch", "deepspeed"}
    assert len({plan.offload_optimizer for plan in plans}) == 2
    assert len({(profile.provenance["recipe"], profile.plan.micro_batch) for _, profile in found}) >= 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_command_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--recipe", "tiny") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "tools/predict_memory.py" in err and "--device cpu" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--matrix"),
        (("--recipe", "tinny"), "did you mean 'tiny'"),
        (("--profile", "absent.toml"), "--profile absent.toml"),
        (("--recipe", "tiny", "--cap", "4X"), "--cap '4X' is not a size"),
        (("--recipe", "tiny", "--cap", "0"), "larger than zero"),
        (("--recipe", "tiny", "--steps", "2"), "--steps 2 must be at least 3"),
        (("--recipe", "tiny", "--timeout", "0"), "--timeout 0"),
        (("--recipe", "tiny", "--micro-batch", "0"), "--micro-batch 0"),
        (("--recipe", "tiny", "--micro-batch", "7"), "plan.micro_batch = 7"),
        (("--recipe", "tiny", "--set", "plan.kep=all"), "plan.keep"),
        (("--recipe", "tiny", "--out", __file__ + "/results"), "cannot be written"),
        (("--recipe", "tiny", "--json", "/no/such/folder/r.json"), "there is no such folder"),
    ],
)
def test_bad_input_is_one_message_before_anything_runs(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_command, "measure", lambda *_: pytest.fail("measured"))
    assert command(*arguments, "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("measure_memory: ")


def test_a_refused_configuration_is_bad_input_alone_and_a_failure_among_others() -> None:
    refused, done = {"status": "refused"}, {"status": "ok", "agrees": True}
    assert [measure_command._exit_status(rows) for rows in ([refused], [refused, done], [done])] == [2, 1, 0]
