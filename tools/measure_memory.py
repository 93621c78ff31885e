"""Measures what training takes of the card in this machine, and how far the prediction is off.

Each configuration runs some steps in a process of its own. `--matrix --cap 3.2G --out FOLDER` measures a set of
configurations and writes their recordings (replay them with python -m nvae_lowmem.memory.allocator FOLDER) and a
calibration file for tools/predict_memory.py and fit_memory.py. Without a card, --device cpu checks the step's
allocations against the prediction's.

Exit status: 0 all as predicted; 1 a run failed; 2 when the command line, a file or the machine is at fault; 3 a run
took more than predicted and its margin, or the replay of a recording differs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.memory.measure_command import run_measure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and return the exit status."""
    return run_measure(sys.argv[1:] if argv is None else argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
