"""Fits every published recipe to small cards: writes profiles/CARD-RECIPE.toml and the table of what trains on what.

Exit status: 0 done; 1 with --check: a file is not what the predictor says; 2 when the command line or a file is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.memory.shipped_command import run_ship


def main(argv: Sequence[str] | None = None) -> int:
    """Make or check the shipped profiles; returns the exit status: 0 done, 1 a file is wrong, 2 bad input."""
    return run_ship(sys.argv[1:] if argv is None else argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
