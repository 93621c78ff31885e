"""What a run says while it goes on, whenever it was begun."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_runs import STEPS, run, write_profile

from nvae_lowmem.hardware import cuda_memory
from nvae_lowmem.training import checkpoint


def test_the_peak_is_told_after_three_steps_of_a_resumed_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that step's figures are not logged: after 2 + 3 steps, which is no power of two."""
    monkeypatch.setattr(cuda_memory, "predicted_vs_measured", lambda *_: "the measured peak")
    profile, folder = (
        write_profile(tmp_path, steps=f"steps = {STEPS + 2}", log_every="log_every = 1000"),
        tmp_path / "run",
    )
    assert run(profile, "--run-dir", str(folder)).said.count("the measured peak") == 1
    for path in checkpoint.all_checkpoints(folder)[2:]:
        shutil.rmtree(path)
    said = run(profile, "--run-dir", str(folder)).said
    assert "after step 2" in said and said.count("the measured peak") == 1
