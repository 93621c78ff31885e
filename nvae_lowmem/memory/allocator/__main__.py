"""python -m nvae_lowmem.memory.allocator DIR: replay recordings through the simulated allocator."""

from __future__ import annotations

import sys

from nvae_lowmem.memory.allocator.replay import main

if __name__ == "__main__":
    sys.exit(main())
