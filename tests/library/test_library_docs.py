"""The examples of docs/library.md and the notebook run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from generation_runs import DIGITS, responsive, write_run

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def folder_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_run(tmp_path / "runs" / "00000-digits", responsive(DIGITS), micro_batch=20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_library_page_run(folder_with_a_run: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
    assert {"sample.png", "latents.safetensors"} <= {path.name for path in folder_with_a_run.iterdir()}


def test_the_notebook_runs(folder_with_a_run: Path) -> None:
    notebook = json.loads((DOCS / "library.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "docs/library.ipynb", "exec"), names)
    assert len(names["strip"]) == 7  # type: ignore[arg-type]
