"""Find the best memory plan of a model for a card, and write the profile to train with."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.fit_memory import main

if __name__ == "__main__":
    sys.exit(main())
