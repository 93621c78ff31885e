"""The settings and the shipped profiles as a person looks them up; docs/settings.md is what the command makes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from nvae_lowmem.commands import profiles, settings
from nvae_lowmem.config.profile_file import load, loads, shipped_profiles
from nvae_lowmem.config.settings import SECTIONS
from nvae_lowmem.config.settings import settings as all_settings

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_field_is_a_setting_with_a_text_a_kind_and_its_default() -> None:
    found = all_settings()
    assert [s.key for s in found] == [f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in fields(kind)]
    assert all(len(s.text) > 10 and s.kind for s in found)
    assert not [s.key for s in found if "typing" in s.kind or "None" in s.kind]


def test_the_defaults_as_they_are_written_are_the_profile_without_any_setting() -> None:
    size = "model.image_size = 28"  # which cannot be halved as often as the other defaults ask for
    lines = [f"{s.section}.{s.name} = {s.default}" for s in all_settings() if s.default]
    assert size in lines
    assert loads("\n".join(lines).replace(size, "model.image_size = 32")) == loads("model.image_size = 32")


def test_a_word_finds_settings_by_name_and_by_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.main(["LEARNING_rate"]) == 0
    out = capsys.readouterr().out
    assert "training.learning_rate = 0.0\n    a number from 0 to 1,000\n    Peak learning rate" in out
    assert "model." not in out
    assert settings.main(["mirror"]) == 0
    assert capsys.readouterr().out.startswith("data.flip = false")
    assert settings.main(["nosuch"]) == 2


def test_the_page_of_settings_is_what_the_command_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.main(["--markdown"]) == 0
    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == capsys.readouterr().out, "make it anew: python tools/settings.py --markdown > docs/settings.md"


def test_profiles_are_listed_with_where_their_data_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiles.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in shipped_profiles())
    assert profiles.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "demo-mnist" in out and "gtx" not in out and "--data" not in out
    assert profiles.main(["gtx-970-celeba64"]) == 0
    out = capsys.readouterr().out
    assert "--data img_align_celeba.zip --set data.crop=celeba" in out and "3.20 GiB" in out
    assert profiles.main(["nosuch"]) == 2


def test_data_that_a_shipped_profile_names_are_embedded_or_it_is_said_where_they_come_from() -> None:
    from nvae_lowmem.config.recipes import WHERE_FROM
    from nvae_lowmem.config.sections import EMBEDDED_SETS

    assert {load(name).data.source for name in shipped_profiles()} <= {*EMBEDDED_SETS, *WHERE_FROM}
