"""What every benchmark says about where and when it ran. Imports nothing large: see step.py for why."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any


def machine(threads: int) -> dict[str, Any]:
    """Date, processor, versions and threads, for the head of a table and for --json."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "threads": threads,
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def headline(about: dict[str, Any]) -> str:
    """One line of `machine`."""
    return (
        f"{about['date']}, {about['cpu']} ({about['processors']} processors), torch {about['torch']}, "
        f"{about['threads']} threads"
    )


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """The report as a file, where one is asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
