"""Measure what training takes of the card in this machine, and how far the prediction is off."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.measure_memory import main

if __name__ == "__main__":
    sys.exit(main())
