"""Load a published NVAE checkpoint, check it against saved arrays, and make a run of it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed, too

from nvae_lowmem.commands.import_nvlabs import main

if __name__ == "__main__":
    sys.exit(main())
