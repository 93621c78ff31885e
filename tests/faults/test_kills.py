"""The short tier of the kill campaign; all of it is `make test-faults`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
@pytest.mark.timeout(600)
def test_runs_that_are_killed_at_random_and_while_they_save_end_bit_equal() -> None:
    arguments = ["--kills", "10", "--only", "torch fp32", "--seconds", "500"]
    ended = subprocess.run([sys.executable, str(CAMPAIGN), *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and " 0 lost" in ended.stdout, ended.stdout + ended.stderr
