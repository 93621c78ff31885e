"""Every setting of a profile with its type, range, default and documentation, read off the sections themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from nvae_lowmem.config.limits import Range
from nvae_lowmem.config.model import ModelConfig
from nvae_lowmem.config.profile_file import describe_kind
from nvae_lowmem.config.sections import DataConfig, MemoryPlan, TrainConfig

SECTIONS: dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "training": TrainConfig, "plan": MemoryPlan}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of a profile."""

    section: str
    name: str
    kind: str
    """What its value has to be, in words."""
    default: str
    """As it is written in a profile; empty: no value."""
    text: str
    """The field's docstring, in one line."""

    @property
    def key(self) -> str:
        """As `--set` takes it: training.total_batch."""
        return f"{self.section}.{self.name}"


@cache
def settings() -> tuple[Setting, ...]:
    """All settings, section by section, in the order of their fields."""
    return tuple(setting for section, kind in SECTIONS.items() for setting in _of_section(section, kind))


def _of_section(section: str, kind: Any) -> Iterator[Setting]:
    texts, hints = _docstrings(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, extras = _without_extras(hints[field.name])
        ranges = [str(extra) for extra in extras if isinstance(extra, Range)]
        default = field.default_factory() if callable(field.default_factory) else field.default
        yield Setting(
            section=section,
            name=field.name,
            kind=" ".join([describe_kind(hint), *ranges]),
            default=_as_toml(default),
            text=texts[field.name],
        )


def _without_extras(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the type, what Annotated adds to it)."""
    return (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())


def _docstrings(kind: Any) -> dict[str, str]:
    """The string below each field, which Python itself forgets."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
            found[field.target.id] = " ".join(below.value.value.split())
    return found


def _as_toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value!r}"
