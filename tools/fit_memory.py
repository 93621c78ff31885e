"""Finds the best memory plan of a model for a card, with reasons, and writes the profile to train with; needs no GPU.

Exit status: 0 a plan fits; 3 nothing fits, and what would make it fit; 2 when the command line or a file is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.memory.fit_command import run_fit


def main(argv: Sequence[str] | None = None) -> int:
    """Find a plan, print it and write the profile; returns the exit status: 0 fits, 3 nothing fits, 2 bad input."""
    return run_fit(sys.argv[1:] if argv is None else argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
