"""The table of what trains on which card: its rows as a file of data, and what the documents show of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from nvae_lowmem.config.profile_file import PROFILES_DIR
from nvae_lowmem.config.recipes import PUBLISHED_RECIPES
from nvae_lowmem.errors import ConfigError, command_line
from nvae_lowmem.memory.catalogue.catalogue import TARGETS, CardRecipe, CatalogueRow, cells
from nvae_lowmem.memory.plan.duration import format_days, range_text
from nvae_lowmem.units import format_bytes

CatalogueRows = Mapping[str, CatalogueRow]
"""By the name of the cell, which is that of the profile."""
TABLE_FILE = PROFILES_DIR / "table.json"
_BEGIN, _END = "<!-- made by tools/ship_profiles.py from profiles/table.json -->", "<!-- end of what was made -->"


def load_rows(path: Path = TABLE_FILE) -> dict[str, CatalogueRow]:
    """The rows of the file, none where there is no file. Raises ConfigError for a file that is not such a table."""
    if not path.exists():
        return {}
    try:
        rows = [CatalogueRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is no table of rows ({error}): make it anew: {command_line('ship-profiles')}"
        ) from None
    return {f"{row.target}-{row.recipe}": row for row in rows}


def save_rows(rows: CatalogueRows, path: Path = TABLE_FILE) -> None:
    """Write the rows in the order of the table, one per line."""
    lines = [json.dumps(asdict(rows[cell.name])) for cell in cells() if cell.name in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


# ---- as Markdown -----------------------------------------------------------------------------------------------------


def overview(rows: CatalogueRows) -> str:
    """Cards down, recipes across: micro-batch, and days for the recipe's epochs."""
    found = [["card (memory for torch)", *PUBLISHED_RECIPES]]
    for target in TARGETS:
        own = [rows.get(CardRecipe(target, name).name) for name in PUBLISHED_RECIPES]
        found.append([f"{target.title} ({format_bytes(target.budget().cap_bytes)})", *map(_short, own)])
    return _markdown(found)


def _short(row: CatalogueRow | None) -> str:
    if row is None:
        return "?"
    if not row.fits:
        return "does not fit"
    batch = str(row.micro_batch) if row.accumulation == 1 else f"{row.micro_batch} x {row.accumulation}"
    fewer = "" if row.groups == row.own_groups else f", {' + '.join(map(str, row.groups))} groups"
    return f"{batch}: {format_days(*row.training_seconds)}{fewer}"


def details(rows: CatalogueRows) -> str:
    """A table per card with everything that is predicted of its profiles."""
    out = []
    for target in TARGETS:
        own = [row for name in PUBLISHED_RECIPES if (row := rows.get(CardRecipe(target, name).name)) is not None]
        out += [f"### {target.title}", "", f"For torch: {target.budget().reason}.", ""]
        out += [_markdown([_TITLES, *map(_long, own)]), ""]
    return "\n".join(out[:-1])


_TITLES = (
    "profile|precision|groups|micro-batch|blocks keep|optimiser|allocated|reserved + margin|of the cap|host memory|"
    "cache given back per step|seconds per step|images/s|the recipe's epochs take"
).split("|")


def _long(row: CatalogueRow) -> list[str]:
    size = format_bytes
    return [
        f"`{row.target}-{row.recipe}`" if row.fits else f"{row.recipe}: does not fit",
        row.precision,
        " + ".join(map(str, row.groups)),
        f"{row.micro_batch} x {row.accumulation}",
        ", ".join(f"{n} {keep}" for keep, n in row.keeps.items()),
        "host" if row.offload_optimizer else "card",
        size(row.allocated_bytes),
        f"{size(row.reserved_bytes)} + {size(row.margin_bytes)}",
        f"{int(100 * row.share)}%",
        size(row.host_bytes),
        str(row.retries),
        range_text(row.time.least_seconds, row.time.most_seconds),
        range_text(*row.time.images_per_second),
        format_days(*row.training_seconds),
    ]


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


# ---- in the documents ------------------------------------------------------------------------------------------------


def documents(root: Path = PROFILES_DIR.parent) -> dict[Path, str]:
    """The documents that show the rows, as they should be: path -> text. Raises ConfigError where one has no place."""
    rows = load_rows(root / "profiles" / TABLE_FILE.name)
    parts = {root / "README.md": overview(rows), root / "docs" / "cards.md": details(rows)}
    return {path: _replaced(path, text) for path, text in parts.items()}


def _replaced(path: Path, made: str) -> str:
    """The document's text with `made` between its two marks."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; run this from a checkout") from None
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(f"{path} has no place for the table: write these two lines into it\n{_BEGIN}\n{_END}")
    return f"{before}{begin}\n{made}\n{end}{after}"
