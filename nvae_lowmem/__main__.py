"""python -m nvae_lowmem COMMAND ...: the same as nvae-lowmem."""

from __future__ import annotations

import sys

from nvae_lowmem.commands.console import main

if __name__ == "__main__":
    sys.exit(main())
