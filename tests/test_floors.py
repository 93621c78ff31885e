"""The house stands: imports run downwards only, every file is short enough to read, every module can be imported.

Floors, from the cellar up. A file may import from its own room and from lower floors, never sideways or upwards, not
even lazily inside a function or for types only.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "nvae_lowmem"
FLOORS = {
    "nvae_lowmem": 0,  # errors, units, progress, tables of text and the package's own __init__.py
    "nvae_lowmem.config": 1,
    "nvae_lowmem.hardware": 2,
    "nvae_lowmem.model": 2,
    "nvae_lowmem.data": 2,
    "nvae_lowmem.training.engines": 3,
    "nvae_lowmem.training": 4,
    "nvae_lowmem.summary": 4,
    "nvae_lowmem.interop": 4,
    "nvae_lowmem.generation": 5,
    "nvae_lowmem.evaluation": 5,
    "nvae_lowmem.memory": 6,
    "nvae_lowmem.memory.allocator": 6,
    "nvae_lowmem.memory.trace": 7,
    "nvae_lowmem.memory.predict": 8,
    "nvae_lowmem.memory.plan": 9,
    "nvae_lowmem.memory.measure": 9,
    "nvae_lowmem.memory.catalogue": 10,
    "nvae_lowmem.budget": 10,
    "nvae_lowmem.demo": 10,
    "nvae_lowmem.library": 11,
    "nvae_lowmem.commands": 12,
    "nvae_lowmem.__main__": 13,
    "launch": 13,
    "tools": 13,
}
LONGEST_FILE = 450
LARGEST_SHARE = 0.26
SHORT_FILES = {  # under 60 lines, and why
    "__main__.py": "python -m nvae_lowmem",
    "commands/decode.py": "a command: flags and one call",
    "commands/demo.py": "a command: flags and one call",
    "commands/doctor.py": "a command: flags and one call",
    "commands/fine_tuning.py": "what --init-from means for the other flags; flags.py must not import torch",
    "commands/image_inputs.py": "what the commands on images share; flags.py must not import torch",
    "config/choices.py": "names that flags need before torch is imported",
    "config/paths.py": "one subject: paths that come back as they were",
    "data/cache.py": "one subject: files that are whole or not there",
    "data/digits.py": "one embedded set",
    "data/randomness.py": "one subject: what the data draw",
    "data/split.py": "one rule: which images are held out",
    "generation/series.py": "one subject: many images into files",
    "hardware/cpu.py": "before torch is imported, so nothing else may stand here",
    "memory/allocator/__main__.py": "python -m nvae_lowmem.memory.allocator",
    "memory/predict/figures.py": "the type that predictions and measurements share",
    "model/hooks.py": "the list of all that is set on a model from outside",
    "model/host.py": "a mark that model and tracer share",
    "model/regularizers.py": "what a step tells the layers",
    "progress.py": "a root module: every room may say how far it is",
    "splitmix.py": "a root module: noise and data are hashed with the same constants",
    "text_table.py": "a root module: every room may draw a table",
    "training/batch_split.py": "one equation: total = micro-batch x accumulation x processes",
    "training/engines/gradient_gate.py": "one decision, the same on every engine",
    "training/first_bad.py": "one search: the first number that is none",
    "training/patient_output.py": "one subject: printing to who no longer listens",
}
SHORTEST_FILE = 60

FILES = sorted(path for top in (PACKAGE, "launch", "tools") for path in (REPOSITORY / top).rglob("*.py"))
IDS = [str(path.relative_to(REPOSITORY)) for path in FILES]
TESTS = [
    pytest.param(path, id=str(path.relative_to(REPOSITORY))) for path in sorted((REPOSITORY / "tests").rglob("*.py"))
]


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room that a module is in: the deepest folder. Raises KeyError for a folder that has no place in the house."""
    parts = module.split(".")
    if parts[0] != PACKAGE or module == f"{PACKAGE}.__main__":
        return module if parts[0] == PACKAGE else parts[0]
    folder = PACKAGE
    for part in parts[1:]:
        if not (REPOSITORY / folder.replace(".", "/") / part).is_dir():
            break
        folder = f"{folder}.{part}"
    if folder not in FLOORS:
        raise KeyError(f"{folder} has no floor: give it one in FLOORS")
    return folder


def imports_of(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of this project's own modules in a file, wherever in the file it stands."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    if path == REPOSITORY / PACKAGE / "__init__.py":  # the front door: it names the library for type checkers alone
        assert isinstance(tree, ast.Module)
        tree.body = [n for n in tree.body if not isinstance(n, ast.If) or ast.unparse(n.test) != "TYPE_CHECKING"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from nvae_lowmem import model` imports a module, `from nvae_lowmem.model import NVAE` a name in one:
            # with both spelt out in full, the room is the same.
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in (PACKAGE, "launch", "tools"))


def breaches(path: Path, source: str) -> list[str]:
    """Every import in the file that does not run downwards."""
    own = room_of(module_of(path))
    found = []
    for line, module in imports_of(path, ast.parse(source)):
        room = room_of(module)
        if room != own and FLOORS[room] >= FLOORS[own]:
            found.append(f"line {line}: {own} (floor {FLOORS[own]}) imports {module} (floor {FLOORS[room]})")
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_run_downwards_only(path: Path) -> None:
    assert breaches(path, path.read_text(encoding="utf-8")) == []


def modules_imported(path: Path) -> set[str]:
    """The project's own modules that a file imports when it is itself imported or run, lazily or not."""
    found = set()
    for _, name in imports_of(path, ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            candidate = REPOSITORY.joinpath(*parts[:end])
            if candidate.with_suffix(".py").is_file() or (candidate / "__init__.py").is_file():
                found.add(".".join(parts[:end]))
                break
    return found - {module_of(path)}


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty where there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return [*error.args[1]]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle_in({module_of(path): modules_imported(path) for path in FILES}) == []


def test_a_circle_would_be_seen() -> None:
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("file", "source", "is_breach"),
    [
        ("nvae_lowmem/training/step.py", "from nvae_lowmem.model.nvae import NVAE", False),
        ("nvae_lowmem/training/step.py", "from nvae_lowmem.training import optim", False),
        ("nvae_lowmem/training/step.py", "from . import optim", False),
        ("nvae_lowmem/training/step.py", "from ..config import Profile", False),
        ("nvae_lowmem/training/step.py", "import torch, numpy", False),
        ("nvae_lowmem/training/step.py", "from nvae_lowmem.memory import trace", True),
        ("nvae_lowmem/training/step.py", "from nvae_lowmem import memory", True),
        ("nvae_lowmem/training/step.py", "def f():\n    import nvae_lowmem.generation.sample", True),
        ("nvae_lowmem/training/step.py", "from ..interop import nvlabs", True),
        ("nvae_lowmem/training/step.py", "importlib.import_module('nvae_lowmem.memory.plan.fit')", True),
        ("nvae_lowmem/training/step.py", "import launch.train", True),
        ("nvae_lowmem/model/__init__.py", "from .nvae import NVAE", False),
        ("nvae_lowmem/model/__init__.py", "from ..data import sources", True),
        ("nvae_lowmem/__init__.py", "from nvae_lowmem.model import NVAE", True),
        ("nvae_lowmem/units.py", "from nvae_lowmem.errors import ConfigError", False),
        ("launch/train.py", "from nvae_lowmem.memory import fit", False),
        ("launch/train.py", "import tools.doctor", True),
    ],
)
def test_a_breach_of_the_floors_would_be_seen(file: str, source: str, is_breach: bool) -> None:
    assert bool(breaches(REPOSITORY / file, source)) == is_breach


@pytest.mark.parametrize(
    "path", [*(pytest.param(path, id=name) for path, name in zip(FILES, IDS, strict=True)), *TESTS]
)
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_no_test_module_imports_another() -> None:
    """What several of them need lies at the top of tests/, in a file that holds no tests."""
    importing = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)
    paths = sorted((REPOSITORY / "tests").rglob("*.py"))
    assert [path.name for path in paths if importing.search(path.read_text(encoding="utf-8"))] == []


def test_a_file_is_short_only_for_a_reason() -> None:
    package = REPOSITORY / PACKAGE
    short = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py" and len(path.read_text(encoding="utf-8").splitlines()) < SHORTEST_FILE
    }
    assert short - SHORT_FILES.keys() == set(), "give it a reason, or a room where it belongs"
    assert SHORT_FILES.keys() - short == set(), "no longer short: take the reason away"


def test_no_room_holds_more_than_its_share() -> None:
    lines: dict[str, int] = {}
    for path in (REPOSITORY / PACKAGE).rglob("*.py"):
        room = path.relative_to(REPOSITORY / PACKAGE).parts[0]
        lines[room] = lines.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    assert max(lines.values()) / sum(lines.values()) <= LARGEST_SHARE, lines


def test_every_public_function_and_class_says_what_it_is() -> None:
    silent = []
    for path, name in zip(FILES, IDS, strict=True):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                silent += [] if ast.get_docstring(node) else [f"{name}: {node.name}"]
    assert silent == []


def test_every_class_has_a_name_of_its_own() -> None:
    homes: dict[str, list[str]] = {}
    for path, name in zip(FILES, IDS, strict=True):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_module_can_be_imported(path: Path) -> None:
    """Also without the optional libraries: what needs one imports it where it is used."""
    if path.is_relative_to(REPOSITORY / PACKAGE):
        importlib.import_module(module_of(path))
        return
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    assert callable(module.main)


def test_every_folder_of_the_package_is_one_that_setuptools_finds() -> None:
    folders = {path.parent for path in FILES if path.is_relative_to(REPOSITORY / PACKAGE)}
    assert [str(folder.relative_to(REPOSITORY)) for folder in folders if not (folder / "__init__.py").exists()] == []


def text_files() -> list[Path]:
    suffixes = {".py", ".md", ".toml", ".cfg", ".txt", ".yml", ".json"}
    named = {"Makefile", "LICENSE", ".gitignore", "run"}
    skipped = {".git", ".venv", ".venv-cuda", "venv", "build", "dist", "runs", "__pycache__"}
    skipped |= {".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    found = []
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = [name for name in folders if name not in skipped]  # an environment holds thousands of files
        found += [Path(folder, name) for name in files if Path(name).suffix in suffixes or name in named]
    return found


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    # Spelt with a bracket, so that this file does not find itself.
    private = re.compile(r"(?<![\w.])/(wor[k]|roo[t]|User[s]|tmp/ven[v]|tmp/brie[f])(/|\b)")
    guilty = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if private.search(line):
                guilty.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}")
    assert guilty == []
