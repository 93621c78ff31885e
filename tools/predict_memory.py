"""Predict what training takes of a card's memory and of the host's, and what owns the peak."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.predict_memory import main

if __name__ == "__main__":
    sys.exit(main())
