"""A file system that really is full, and one that really is read-only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import write_profile

SCRIPT = Path(__file__).with_name("on_a_small_disk.py")


def _own_mounts(tmp_path: Path) -> bool:
    """Whether this machine lets us mount a file system that nobody else sees."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_full_disk_and_a_read_only_one_cost_no_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _own_mounts(disk):
        pytest.skip("no mount namespace of its own here (unshare -rm)")
    profile = write_profile(tmp_path, evaluate_images="evaluate_images = 2")
    command = ["unshare", "-rm", sys.executable, str(SCRIPT), str(disk), str(profile)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: state["code"] for name, state in found.items()} == {
        "with room": 0, "full": 2, "with room again": 0, "read-only": 2, "read-only, a new run": 2,
    }  # fmt: skip
    assert [found[n]["newest"] for n in ("with room", "full", "with room again", "read-only")] == [2, 2, 4, 4]
    assert all(state.get("whole", True) for state in found.values())
    for name in ("full", "read-only", "read-only, a new run"):
        complaints = [line for line in found[name]["complained"].splitlines() if "lines for" not in line]
        assert len(complaints) == 1 and "Traceback" not in complaints[0], found[name]
    assert "No space left on device" in found["full"]["complained"] and "Make room" in found["full"]["complained"]
    assert str(disk / "run") in found["full"]["complained"]
    assert "Read-only file system" in found["read-only"]["complained"]
