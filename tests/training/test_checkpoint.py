"""Checkpoints: whole or not there, whatever interrupts the save; what is damaged or foreign is refused in words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvae_lowmem.config import profile_file as profiles
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.training import checkpoint
from nvae_lowmem.training.checkpoint_files import MODEL, STATE, TRAINING

SMALL = ModelConfig(
    image_size=8, bits=1, channels_encoder=4, channels_decoder=4, scales=1, groups=1, latents=2,
    preprocess_blocks=1, preprocess_cells=1, postprocess_blocks=1, postprocess_cells=1,
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[2]


def tensors(value: float, elements: int = 1000) -> dict[str, Tensor]:
    return {"w": torch.full((elements,), value), "n": torch.tensor(value)}


def save(run: Path, step: int, keep_last: int = 3) -> Path:
    return checkpoint.save(run, step, tensors(step), tensors(step + 0.5), keep_last)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def message(checkpoint_folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_training(checkpoint_folder)
    assert "\n" not in str(caught.value) and str(checkpoint_folder) in str(caught.value)
    return str(caught.value)


# --- saved and read back ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = {
        "half": torch.randn(7, 3, generator=generator).half(),
        "whole": torch.randint(0, 9, (2, 2), generator=generator),
        "turned": torch.randn(4, 5, generator=generator).t(),
        "empty": torch.empty(0, 3),
        "zero": torch.tensor([0.0, -0.0, 1e-45]),
    }
    path = checkpoint.save(tmp_path, 12, model, tensors(3.0), keep_last=1)
    assert path.name == "step-00000012" and checkpoint.newest(tmp_path) == path
    step, training, weights = checkpoint.load_training(path)
    assert step == 12 and weights.keys() == model.keys()
    for name, value in model.items():
        assert weights[name].dtype == value.dtype
        torch.testing.assert_close(weights[name], value, rtol=0.0, atol=0.0)
    assert all(torch.equal(training[name], value) for name, value in tensors(3.0).items())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(steps=st.lists(st.integers(0, 10**7), min_size=1, max_size=8), keep_last=st.integers(1, 4))
def test_only_the_newest_are_kept(tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep_last: int) -> None:
    run, there = tmp_path_factory.mktemp("run"), set[int]()
    for step in steps:
        save(run, step, keep_last)
        earlier = sorted(s for s in there | {step} if s <= step)
        there = {*earlier[-keep_last:], *(s for s in there if s > step)}
        assert names(run) == [f"step-{s:08d}" for s in sorted(there)]
    assert checkpoint.newest(run) == run / "checkpoints" / f"step-{max(there):08d}"


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpoint.save(tmp_path, 3, tensors(-1.0), tensors(-2.0), keep_last=3)
    path = checkpoint.newest(tmp_path)
    assert path is not None and names(tmp_path) == ["step-00000003"]
    assert checkpoint.load_training(path)[1]["n"] == -2.0


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "nowhere") is None


# --- interrupted saves ------------------------------------------------------------------------------------------------

SAVING = """
import sys, itertools, torch
from pathlib import Path
from nvae_lowmem.training import checkpoint
for step in itertools.count(1):
    weights = {"w": torch.full((500_000,), float(step)), "n": torch.tensor(float(step))}
    checkpoint.save(Path(sys.argv[1]), step, weights, weights, keep_last=2)
"""


def half_done(run: Path) -> bool:
    """Whether a save is under way that has written something, but not the last file."""
    for partial in run.glob("checkpoints/.partial-*"):
        with contextlib.suppress(OSError):
            if not (partial / STATE).exists() and any(file.stat().st_size for file in partial.iterdir()):
                return True
    return False


def kill_in_mid_save(run: Path, after: int, seconds: float = 60.0) -> None:
    """Start a process that saves without end, and kill -9 it within a save, `after` checkpoints later."""
    child = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(run)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wanted, give_up = f"step-{after:08d}", time.monotonic() + seconds
    try:
        while time.monotonic() < give_up and child.poll() is None:
            newest = max((path.name for path in run.glob("checkpoints/step-*")), default="")
            if newest < wanted or not half_done(run):
                continue
            os.kill(child.pid, signal.SIGSTOP)  # so that it is still within that save when it is killed
            time.sleep(0.01)
            if half_done(run):
                return
            os.kill(child.pid, signal.SIGCONT)
        raise AssertionError(f"no save was caught half done; exit {child.poll()}")
    finally:
        child.kill()
        child.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
@pytest.mark.timeout(120)
def test_a_process_killed_while_it_saves_leaves_a_whole_newest_checkpoint(tmp_path: Path) -> None:
    for after in (1, 3):
        kill_in_mid_save(tmp_path, after)
        assert half_done(tmp_path)
        path = checkpoint.newest(tmp_path)
        assert path is not None and path == checkpoint.all_checkpoints(tmp_path)[-1]
        step, training, weights = checkpoint.load_training(path)
        assert step >= after and path.name == f"step-{step:08d}"
        for read in (training, weights):
            assert read["n"] == step and torch.equal(read["w"], torch.full((500_000,), float(step)))
    checkpoint.tidy(tmp_path)
    save(tmp_path, step + 1, keep_last=2)
    assert names(tmp_path) == [f"step-{s:08d}" for s in (step, step + 1)]  # and nothing half done is left


def test_a_failing_disk_leaves_the_checkpoints_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "replace", no_space)
        save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == before and checkpoint.load_training(before)[0] == 1
    assert save(tmp_path, 2) == checkpoint.newest(tmp_path) and names(tmp_path) == [before.name, "step-00000002"]


# --- damaged and foreign checkpoints ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([MODEL, TRAINING, STATE]), share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_file_truncated_anywhere_is_refused_and_an_older_checkpoint_found(
    tmp_path: Path, name: str, share: float
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = newer / name
    with file.open("r+b") as handle:
        handle.truncate(int(share * file.stat().st_size))
    text = message(newer)
    assert "truncated" in text or "damaged" in text
    assert checkpoint.newest(tmp_path) == older and checkpoint.load_training(older)[0] == 1


@pytest.mark.parametrize("name", [MODEL, TRAINING, STATE])
def test_a_missing_file_is_refused_and_an_older_checkpoint_found(tmp_path: Path, name: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / name).unlink()
    assert "missing" in message(newer)
    assert checkpoint.newest(tmp_path) == older


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"{}", b'{"format": 1}', b"\xff\xfe", b'{"bytes": 3}', b'{"format": 2, "bytes": {}}']
)
def test_a_state_that_says_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 1)
    (path / STATE).write_bytes(content)
    assert "damaged" in message(path)


def test_a_header_that_is_not_safetensors_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    size = (path / TRAINING).stat().st_size
    (path / TRAINING).write_bytes(b"\xff" * size)
    assert TRAINING in message(path)


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_version_is_named_with_what_to_do(tmp_path: Path, version: object) -> None:
    path = save(tmp_path, 1)
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {"format": version}))
    text = message(path)
    assert f"format {version!r}" in text and "reads 1 and 2" in text and "use the version" in text
    assert checkpoint.newest(tmp_path) is None


def test_weights_alone_cannot_be_trained_on(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 0, tensors(1.0), {}, keep_last=1)
    assert not (path / TRAINING).exists() and checkpoint.newest(tmp_path) == path
    assert "weights only" in message(path)


# --- runs -------------------------------------------------------------------------------------------------------------


def a_run(folder: Path) -> NVAE:
    """A folder that can be sampled from, and the model in it."""
    torch.manual_seed(3)
    model = NVAE(SMALL)
    checkpoint.export_weights(folder, Profile(name="small", model=SMALL), model.state_dict())
    return model


def test_exported_weights_make_a_run_that_can_be_loaded(tmp_path: Path) -> None:
    model = a_run(tmp_path / "run")
    profile, loaded, path = checkpoint.load_run(tmp_path / "run")
    assert profile == Profile(name="small", model=SMALL) and path == checkpoint.newest(tmp_path / "run")
    assert not loaded.training and not any(m.training for m in loaded.modules())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_exporting_over_a_run_is_refused(tmp_path: Path) -> None:
    model = a_run(tmp_path)
    with pytest.raises(ConfigError, match=r"--out .*there is a run already"):
        checkpoint.export_weights(tmp_path, Profile(model=SMALL), model.state_dict())


def test_a_run_without_a_whole_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    profiles.save(Profile(model=SMALL), tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="no whole checkpoint.*--run"):
        checkpoint.load_run(tmp_path)


@pytest.mark.parametrize("change", ["missing", "shape", "foreign"])
def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, change: str) -> None:
    a_run(tmp_path)
    path = checkpoint.newest(tmp_path)
    assert path is not None
    weights = load_file(path / MODEL)
    victim = next(iter(weights))
    if change == "missing":
        del weights[victim]
    elif change == "shape":
        weights[victim] = torch.zeros(3, 3, 3)
    else:
        weights[victim := "blocks.nobody.weight"] = torch.zeros(1)
    save_file(weights, path / MODEL)
    (path / STATE).write_text(json.dumps({"format": 1, "step": 0, "bytes": {MODEL: (path / MODEL).stat().st_size}}))
    with pytest.raises(ConfigError, match="1 tensors do not belong") as caught:
        checkpoint.load_run(tmp_path)
    assert victim in str(caught.value)
