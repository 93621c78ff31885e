"""Training as a user starts it: a real run on real digits, what it leaves, how it goes on and how it stops."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import EMA_DECAY, STEPS, run, tree, write_profile

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.model.latents import SeededNoise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.monitor import Monitor, is_early

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = {
    "train/nelbo_iter", "train/recon_iter", "train/kl_iter", "train/loss", "train/lr", "train/norm_loss",
    "train/bn_loss", "train/wdn_coeff", "train/loss_scale", "train/overflows", "kl_coeff/coeff",
    "timing/sec_per_step", "timing/images_per_sec", "kl_vals/layer_0", "kl_vals/layer_1", "kl/active_0",
    "kl/active_1", "kl_coeff/layer_0", "kl_coeff/layer_1",
}  # fmt: skip
HELD_OUT = {"val/nelbo", "val/recon", "val/kl", "val/bpd_elbo", "val_active/layer_0", "val_active/layer_1"}


class Trained(NamedTuple):
    """The one uninterrupted run that several tests look at."""

    profile: Path
    folder: Path
    said: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    profile = write_profile(root)
    result = run(profile, "--data", "mnist5k", "--runs-dir", str(root / "runs"))
    assert (result.code, result.complained) == (0, "")
    return Trained(profile, root / "runs" / "00000-quick", result.said)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_configuration_log_figures_pictures_and_checkpoints(trained: Trained) -> None:
    files = tree(trained.folder)
    events = [name for name in files if name.startswith("events.out.tfevents")]
    pictures = {f"samples/{n}" for n in ("reals.png", f"reconstructions-{STEPS}.png")}
    pictures |= {f"samples/step-{STEPS}-t{t}.png" for t in ("0.7", "0.8", "0.9", "1.0")}
    checkpoints = {
        f"checkpoints/step-{step:08d}/{name}"
        for step in range(1, STEPS + 1)
        for name in ("model.safetensors", "training.safetensors", "state.json")
    }
    assert len(events) == 2  # figures and texts; the row in the table of runs
    assert (
        set(files) - set(events)
        == {".lock", "config.toml", "data.json", "log.txt", "stats.jsonl"} | pictures | checkpoints
    )
    for name in pictures:
        with Image.open(trained.folder / name) as picture:
            assert picture.mode == "RGB" and min(picture.size) > 50


def test_the_configuration_is_the_whole_one_with_every_choice_made(trained: Trained) -> None:
    profile = profiles.load(trained.folder / "config.toml")
    assert profile.data.source == "mnist5k" and profile.model.image_size == 16
    assert profile.plan.precision == "fp32" and profile.plan.micro_batch == 4
    assert profile.training.total_batch == 8 and profile.training.steps == STEPS


def test_the_command_says_what_it_does_and_where(trained: Trained) -> None:
    parameters = sum(p.numel() for p in NVAE(profiles.load(trained.profile).model).parameters())
    for words in (
        f"{parameters:,} parameters",
        "total batch 8 = micro-batch 4 x accumulation 2 x processes 1",
        "5,000 MNIST digits",
        f"run folder {trained.folder}",
        f"tensorboard --logdir {trained.folder}",
        "on 6 images",
        f"step {STEPS}/{STEPS}",
        f"launch/sample.py --run {trained.folder}",
    ):
        assert words in trained.said, words
    log = (trained.folder / "log.txt").read_text()
    assert all(f"step {step}/{STEPS}  nelbo" in log and f"saved {trained.folder}" in log for step in range(1, STEPS))


def test_figures_have_the_published_names_in_every_step(trained: Trained) -> None:
    found = records(trained.folder)
    training = [r for r in found if "train/loss" in r]
    held_out = [r for r in found if "val/nelbo" in r]
    assert [r["step"] for r in training] == list(range(1, STEPS + 1)) and [r["step"] for r in held_out] == [2, 4]
    assert all(r.keys() - {"step", "time_seconds"} == FIGURES for r in training)
    assert all(r.keys() - {"step", "time_seconds"} == HELD_OUT for r in held_out)
    assert all(math.isfinite(value) for r in found for value in r.values())


def test_figures_agree_with_each_other(trained: Trained) -> None:
    for r in records(trained.folder):
        if "train/loss" in r:
            assert r["train/nelbo_iter"] == pytest.approx(r["train/recon_iter"] + r["train/kl_iter"], rel=1e-6)
            assert r["train/kl_iter"] == pytest.approx(r["kl_vals/layer_0"] + r["kl_vals/layer_1"], rel=1e-5)
            assert r["timing/images_per_sec"] == pytest.approx(8 / r["timing/sec_per_step"])
        else:
            assert r["val/nelbo"] == pytest.approx(r["val/recon"] + r["val/kl"])
            assert r["val/bpd_elbo"] == pytest.approx(r["val/nelbo"] / (16 * 16 * math.log(2)))


def test_tensorboard_reads_the_same_figures_and_the_pictures(trained: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.folder))
    events.Reload()
    charts = {name: f"z_{name}" if "layer_" in name or "active_" in name else name for name in FIGURES | HELD_OUT}
    assert set(events.Tags()["scalars"]) == {*charts.values(), "final/nelbo", "final/bpd_elbo"}
    for name, chart in charts.items():
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records(trained.folder) if name in r]
        assert [(event.step, event.value) for event in events.Scalars(chart)] == expected
    assert {"reconstructed", "generated_0.7", "generated_1.0"} <= set(events.Tags()["images"])
    (picture,) = events.Images("generated_1.0")
    assert picture.step == STEPS
    drawn = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB"))
    written = np.asarray(Image.open(trained.folder / "samples" / f"step-{STEPS}-t1.0.png"))
    assert np.array_equal(drawn, written)


def test_what_sampling_reads_are_the_averaged_weights_and_the_last_statistics(trained: Trained) -> None:
    saved = checkpoint.all_checkpoints(trained.folder)
    averaged = load_file(saved[0] / checkpoint.MODEL)
    for step, path in enumerate(saved[1:], start=2):
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        live, found = load_file(path / checkpoint.TRAINING), load_file(path / checkpoint.MODEL)
        for name, value in found.items():
            if f"weight.{name}" in live:
                averaged[name] = decay * averaged[name] + (1 - decay) * live[f"weight.{name}"]
                torch.testing.assert_close(value, averaged[name], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, live[f"buffer.{name}"]), name
    assert any(not torch.equal(averaged[n.removeprefix("weight.")], v) for n, v in live.items() if n[:7] == "weight.")


def test_the_run_can_be_loaded_to_evaluate(trained: Trained) -> None:
    profile, model, path = checkpoint.load_run(trained.folder)
    assert path.name == f"step-{STEPS:08d}" and profile.name == "quick"
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(2, 1, 16, 16), SeededNoise(0)).nll).all()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained: Trained, tmp_path: Path) -> None:
    for seed, same in ((1, True), (2, False)):
        result = run(trained.profile, "--runs-dir", str(tmp_path / "runs"), "--set", f"training.seed={seed}")
        assert result.code == 0
        found = [r["train/loss"] for r in records(tmp_path / "runs" / f"{seed - 1:05d}-quick") if "train/loss" in r]
        expected = [r["train/loss"] for r in records(trained.folder) if "train/loss" in r]
        assert (found == expected) == same


# --- going on ---------------------------------------------------------------------------------------------------------


def interrupted(trained: Trained, tmp_path: Path, step: int) -> Path:
    """A copy of the run as if it had been killed after `step`."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder)
    for path in checkpoint.all_checkpoints(folder)[step:]:
        shutil.rmtree(path)
    return folder


def test_an_interrupted_run_goes_on_to_the_very_same_end(trained: Trained, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path, 2)
    config = (folder / "config.toml").read_bytes()
    result = run(trained.profile, "--run-dir", str(folder))
    assert result.code == 0 and f"resuming {folder} after step 2" in result.said
    assert (folder / "config.toml").read_bytes() == config
    ends = [checkpoint.load_training(checkpoint.all_checkpoints(f)[-1]) for f in (trained.folder, folder)]
    assert ends[0][0] == ends[1][0] == STEPS
    for expected, found in zip(ends[0][1:], ends[1][1:], strict=True):
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_going_on_passes_over_a_damaged_checkpoint(trained: Trained, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path, 3)
    (checkpoint.all_checkpoints(folder)[-1] / checkpoint.TRAINING).write_bytes(b"cut off")
    result = run(trained.profile, "--run-dir", str(folder))
    assert result.code == 0 and "after step 2" in result.said


def test_a_finished_run_is_left_as_it_is(trained: Trained, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path, STEPS)
    before = tree(folder / "checkpoints")
    result = run(trained.profile, "--run-dir", str(folder))
    assert result.code == 0 and f"already done: {STEPS} of {STEPS} steps" in result.said
    assert tree(folder / "checkpoints") == before and records(folder) == records(trained.folder)


def test_a_changed_configuration_is_refused_by_its_keys(trained: Trained, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path, 2)
    before = tree(folder)
    changes = ("model.latents=3", "model.flows=1", "training.total_batch=16")
    result = run(trained.profile, "--run-dir", str(folder), *(a for c in changes for a in ("--set", c)))
    assert result.code == 2 and result.complained.startswith(f"train.py: --run-dir {folder}")
    assert "model.latents (2 -> 3)" in result.complained and "model.flows" in result.complained
    assert "training." not in result.complained and tree(folder) == before


def test_how_memory_is_used_and_what_is_reported_may_change(trained: Trained, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path, 3)
    free = ("plan.keep='input'", "plan.offload_optimizer=true", "training.log_every=7", "training.keep_last=2")
    result = run(trained.profile, "--run-dir", str(folder), *(a for c in free for a in ("--set", c)))
    assert (result.code, result.complained) == (0, "")
    assert [p.name for p in checkpoint.all_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    ends = [checkpoint.load_training(checkpoint.all_checkpoints(f)[-1])[1] for f in (trained.folder, folder)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_never_resuming_refuses_a_folder_with_a_checkpoint(trained: Trained, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path, 2)
    result = run(trained.profile, "--run-dir", str(folder), "--resume", "never")
    assert result.code == 2 and "--resume is never" in result.complained and str(folder) in result.complained


def test_a_folder_that_was_left_before_its_first_checkpoint_can_be_used_for_another_model(tmp_path: Path) -> None:
    profile, folder = write_profile(tmp_path), tmp_path / "run"
    profiles.save(profiles.override(profiles.load(profile), ["model.latents=5"]), folder / "config.toml")
    result = run(profile, "--run-dir", str(folder), "--steps", "1")
    assert (result.code, result.complained) == (0, "")
    loaded, model, path = checkpoint.load_run(folder)
    assert loaded.model.latents == model.config.latents == 2 and path.name == "step-00000001"


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.timeout(120)
def test_ctrl_c_saves_and_stops_after_the_step_under_way(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, steps="steps = 1000000", save_every="save_every = 1000000")
    folder = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--profile", str(profile), "--run-dir", str(folder),
         "--set", "training.evaluate_every=1000000", "--set", "training.sample_every=1000000", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        log, give_up = folder / "log.txt", time.monotonic() + 60
        while not (log.is_file() and "step 3/" in log.read_text()):
            assert child.poll() is None and time.monotonic() < give_up, child.communicate(timeout=5)
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        said, complained = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130 and complained.count("\n") == 1 and "stopping after this step" in complained
    step = records(folder)[-1]["step"]
    assert f"stopped after step {step}" in said and [p.name for p in checkpoint.all_checkpoints(folder)] == [
        f"step-{step:08d}"
    ]
    saved, state, _ = checkpoint.load_training(checkpoint.all_checkpoints(folder)[0])
    assert saved == step and next(v for k, v in state.items() if k.startswith("step.")) == step


def test_a_loss_that_is_no_number_ends_with_advice_and_its_own_exit_code(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, ema_decay="ema_decay = 0.0\nlearning_rate = 1000\nlearning_rate_min = 1000")
    result = run(profile, "--runs-dir", str(tmp_path / "runs"))
    assert result.code == 4
    assert "is not finite" in result.complained and "training.learning_rate" in result.complained
    assert "Traceback" not in result.complained and result.complained.count("\n") == 1


# --- the monitor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_predicted_and_measured_peaks_are_compared_three_steps_after_every_start(
    first: int, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_memory, "predicted_vs_measured", lambda predicted, margin, device: "so much predicted")
    folder = interrupted(trained, tmp_path, first) if first else tmp_path / "run"
    steps = () if first else ("--steps", "3")
    result = run(trained.profile, "--run-dir", str(folder), *steps, "--set", "training.log_every=100")
    assert result.code == 0 and result.said.count("so much predicted") == 1


def test_early_steps_are_powers_of_two_and_multiples() -> None:
    assert [step for step in range(1, 101) if is_early(step, 40)] == [1, 2, 4, 8, 16, 32, 40, 64, 80]


def test_processes_other_than_the_first_say_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Monitor(None, total_steps=3) as monitor:
        monitor.say("hello")
        monitor.scalars(1, {"a": 1.0})
        monitor.picture(1, "p", np.zeros((2, 2, 3), np.uint8))
        monitor.progress(1, "line", show=True)
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_a_resumed_monitor_replaces_figures_of_steps_that_are_run_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, value in ((0, 1.0), (2, 2.0)):
        with Monitor(tmp_path, 4, first_step) as monitor:
            for step in range(first_step + 1, 5):
                monitor.scalars(step, {"a": value})
        monitor.close()  # twice does no harm
        if not first_step:  # TensorBoard orders files by the second in their names; this run is over within one
            (first,) = tmp_path.glob("events.*")
            first.rename(tmp_path / "events.out.tfevents.1000000000.earlier")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
