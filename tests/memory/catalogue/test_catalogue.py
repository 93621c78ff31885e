"""The committed profiles and their table: each is its recipe on its card, and the documents show what they say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nvae_lowmem.commands.ship_profiles import main
from nvae_lowmem.config.profile_file import PROFILES_DIR, load, save
from nvae_lowmem.config.recipes import PUBLISHED_RECIPES, recipe, with_groups
from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.hardware.budget import Budget
from nvae_lowmem.hardware.card import Card
from nvae_lowmem.memory.catalogue import catalogue as shipped
from nvae_lowmem.memory.catalogue.catalogue import TARGETS, CardRecipe, cells, check_cell, make
from nvae_lowmem.memory.catalogue.table import documents, load_rows, overview, save_rows
from nvae_lowmem.memory.plan.fit import Predictor
from nvae_lowmem.memory.predict.predict import Prediction
from nvae_lowmem.units import GIB

ROWS = load_rows()
FITTING = [cell for cell in cells() if cell.name in ROWS and ROWS[cell.name].fits]
FOUR_GB = [cell for cell in cells() if 2.5 * GIB < cell.target.budget().cap_bytes < 4 * GIB]
TINY = CardRecipe(TARGETS[0], "tiny")


def named(cell: CardRecipe) -> str:
    return cell.name


# ---- what is committed -----------------------------------------------------------------------------------------------


def test_there_is_a_row_for_every_card_and_recipe_and_a_file_for_every_row_that_fits() -> None:
    assert list(ROWS) == [cell.name for cell in cells()]
    others = {path.stem for path in PROFILES_DIR.glob("*.toml") if path.stem.startswith(("lean-", "demo-"))}
    assert {path.stem for path in PROFILES_DIR.glob("*.toml")} - others == {cell.name for cell in FITTING}


@pytest.mark.parametrize("cell", FITTING, ids=named)
def test_a_shipped_profile_is_its_recipe_under_a_plan_for_its_card(cell: CardRecipe) -> None:
    profile, origin, row = load(cell.name), recipe(cell.recipe), ROWS[cell.name]
    made, plan = profile.provenance, profile.plan
    assert profile.name == cell.name and (profile.data, profile.training) == (origin.data, origin.training)
    groups = profile.model.scale_groups
    assert profile.model in (origin.model, with_groups(origin.model, groups))
    assert plan.cap_bytes == cell.target.budget().cap_bytes
    assert plan.engine == "torch"  # runs without DeepSpeed, so under Windows, too
    assert plan.precision == ("bf16" if cell.target.card().bf16 else "fp16")
    assert made["predicted_reserved_bytes"] + made["margin_bytes"] <= plan.cap_bytes
    assert made["predicted_allocated_bytes"] <= made["predicted_reserved_bytes"]
    assert (made["card"], made["os"], made["recipe"]) == (cell.target.card_id, cell.target.os, cell.recipe)
    assert set(made) >= {"versions", "cap", "command", "predicted_host_bytes", "predicted_seconds_per_step"}
    assert (row.micro_batch, row.micro_batch * row.accumulation) == (plan.micro_batch, origin.training.total_batch)
    assert (tuple(row.groups), row.cap_bytes) == (groups, plan.cap_bytes)
    assert (row.allocated_bytes, row.reserved_bytes, row.margin_bytes, row.host_bytes, row.seconds_per_step) == tuple(
        made[key]
        for key in (
            "predicted_allocated_bytes", "predicted_reserved_bytes", "margin_bytes", "predicted_host_bytes",
            "predicted_seconds_per_step",
        )
    )  # fmt: skip


@pytest.mark.parametrize("cell", FOUR_GB, ids=named)
def test_four_gigabytes_train_every_recipe_whole_at_the_published_batch_in_one_piece(cell: CardRecipe) -> None:
    profile = load(cell.name)
    assert profile.plan.micro_batch == recipe(cell.recipe).training.total_batch
    assert profile.model == recipe(cell.recipe).model


def test_four_gigabytes_means_seven_cards_and_systems() -> None:
    assert len(FOUR_GB) == 7 * len(PUBLISHED_RECIPES)


def test_the_documents_show_the_table_that_is_committed() -> None:
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, f"make {path.name} anew: tools/ship_profiles.py --table"
    for cell in cells():
        row = ROWS[cell.name]
        line = next(x for x in overview(ROWS).splitlines() if x.startswith(f"| {cell.target.title} ("))
        shown = line.split(" | ")[1 + PUBLISHED_RECIPES.index(cell.recipe)]
        assert shown.startswith(f"{row.micro_batch}" if row.fits else "does not fit"), cell.name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", cells(), ids=named)
def test_a_shipped_profile_is_what_the_predictor_says(cell: CardRecipe) -> None:
    assert check_cell(cell, ROWS.get(cell.name)) == []


# ---- making and checking ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "PROFILES_DIR", tmp_path)
    return tmp_path


def test_what_is_made_is_the_same_each_time_and_passes_the_check_until_somebody_changes_it(folder: Path) -> None:
    row = make(TINY)
    first = TINY.path.read_bytes()
    assert make(TINY) == row and TINY.path.read_bytes() == first
    assert check_cell(TINY, row) == []
    assert check_cell(TINY, None) == ["2g-tiny: the table has no such row"]
    assert any("seconds per step" in line for line in check_cell(TINY, replace(row, seconds_per_step=1e-3)))

    profile = load(TINY.path)
    save(profile.with_plan(cap_bytes=1 << 30), TINY.path)
    assert any("cap is 1073741824" in line for line in check_cell(TINY, row))
    save(replace(profile, training=replace(profile.training, epochs=1.0)), TINY.path)
    assert any("training is" in line for line in check_cell(TINY, row))
    save(profile.with_plan(keep="host"), TINY.path)
    assert any("predicted now" in line for line in check_cell(TINY, row))
    TINY.path.write_text("name = [")
    assert any("not valid TOML" in line for line in check_cell(TINY, row))
    TINY.path.unlink()
    assert any("no such file" in line for line in check_cell(TINY, row))


def test_a_refresh_keeps_a_plan_that_fits_and_needs_no_retry_and_looks_for_another_where_it_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(TINY)
    own = load(TINY.path).with_plan(keep="input", keep_blocks={})  # not what a search would find
    save(replace(own, provenance={**own.provenance, "margin_bytes": 1}), TINY.path)
    row = make(TINY, refresh=True)
    kept = load(TINY.path)
    assert (kept.plan.keep, kept.plan.keep_blocks) == ("input", {}) and row.keeps == {"input": sum(row.keeps.values())}
    assert kept.provenance["margin_bytes"] > 1 and check_cell(TINY, row) == []

    honest = shipped.predictor_for

    def with_retries(card: Card, budget: Budget) -> Predictor:
        predictor = honest(card, budget)

        def predicted(profile: Profile, micro_batch: int, accumulation: int) -> Prediction:
            found = predictor(profile, micro_batch, accumulation)
            return replace(found, run_retries=2) if profile.plan.keep == "input" else found

        return predicted

    monkeypatch.setattr(shipped, "predictor_for", with_retries)
    row = make(TINY, refresh=True)
    assert load(TINY.path).plan.keep != "input" and row.retries == 0


def test_a_profile_of_a_recipe_that_no_longer_fits_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TINY.path.write_text("left over from another time")
    budget = TINY.target.budget()
    monkeypatch.setattr(shipped.Target, "budget", lambda self: replace(budget, cap_bytes=1 << 20))
    row = make(TINY)
    assert not row.fits and not TINY.path.exists()
    assert check_cell(TINY, row) == []


def test_rows_survive_being_written_and_stay_in_order(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert load_rows(path) == {}
    save_rows(dict(reversed(ROWS.items())), path)
    assert load_rows(path) == ROWS and path.read_bytes() == (PROFILES_DIR / "table.json").read_bytes()
    path.write_text('[{"target": "2g"}]')
    with pytest.raises(ConfigError, match="no table of rows"):
        load_rows(path)


def test_a_document_without_a_place_for_the_table_is_told_the_two_lines(tmp_path: Path) -> None:
    shutil.copytree(PROFILES_DIR, tmp_path / "profiles")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/cards.md"):
        (tmp_path / name).write_text((PROFILES_DIR.parent / name).read_text().replace("| 200: ", "| 1: "))
    assert all("| 200: " in text for path, text in documents(tmp_path).items() if path.name == "README.md")
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ConfigError, match=r"README.md has no place for the table(.|\n)*<!-- made by"):
        documents(tmp_path)


def test_only_names_cards_and_recipes() -> None:
    assert [c.name for c in cells(["4g"])] == [f"4g-{name}" for name in PUBLISHED_RECIPES]
    assert [c.name for c in cells(["mnist", "gtx-970", "4g"])] == ["4g-mnist", "gtx-970-mnist"]
    assert len(cells(["mnist"])) == len(TARGETS)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--only gtx-97", "did you mean 'gtx-970'"),
        ("--only mnist celeba", "did you mean 'celeba64'"),
        ("--jobs 0", "--jobs 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_message_and_exit_status_two(
    asked: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked.split()) == 2
    assert said in capsys.readouterr().err
