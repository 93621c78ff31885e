"""The report of an evaluation: JSON, text, and a page that loads nothing."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from typing import Any

import pytest
from generation_runs import TINY
from PIL import Image

from nvae_lowmem.evaluation.distances import Distance
from nvae_lowmem.evaluation.report import (
    Evaluation,
    LikelihoodFigures,
    Mean,
    scale_of_groups,
    to_html,
    to_json,
    to_text,
)


def evaluation(**changes: Any) -> Evaluation:
    figures = LikelihoodFigures(
        images=1, nelbo=Mean(36 * math.log(2), math.nan), bound=Mean(20.0, math.nan), draws=5, nll=Mean(10.0, 1.0),
        kl=Mean(1.0, 0.1), squared_error=Mean(0.25, 0.0), kl_of_groups=[1.0, 2.0, 3.0, 4.0],
        active_of_groups=[2, 1, 0, 2], active_nats=0.1,
    )  # fmt: skip
    base = {
        "run": "runs/00001-x",
        "checkpoint": "step-1",
        "model": TINY,
        "settings": {"seed": 0},
        "likelihood": figures,
    }
    return Evaluation(**{**base, **changes})


def test_json_has_both_units_and_null_for_what_one_image_cannot_tell() -> None:
    table = json.loads(to_json(evaluation()))
    assert table["negative_elbo"]["bits_per_dim"] == pytest.approx(1.0)  # 36 channel values, 36 ln 2 nats
    assert table["negative_elbo"]["nats_standard_error"] is None
    assert [group["size"] for group in table["groups"]] == [2, 2, 4, 4]
    assert (table["active_channels"], table["latent_channels"]) == (5, 8)


def test_groups_are_counted_from_the_top() -> None:
    assert scale_of_groups(TINY) == [2, 2, 4, 4]


def test_page_holds_its_pictures_and_loads_nothing() -> None:
    png = io.BytesIO()
    Image.new("RGB", (3, 2)).save(png, format="PNG")
    page = to_html(evaluation(pictures={"samples <1>": png.getvalue()}, notes=["a & b"]))
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2  # KL of groups, and the samples
    decoded = [Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))) for s in sources]
    assert decoded[1].size == (3, 2)
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "samples &lt;1&gt;" in page and "a &amp; b" in page


def test_text_names_every_distance() -> None:
    kid_line = Distance("KID(x)", "samples", 0.0123, 0.001, (10, 12))
    text = to_text(evaluation(distances=[kid_line], notes=["look out"]))
    assert re.search(r"KID\(x\): samples +0\.0123 ± 0\.001 over subsets \(10 and 12 images\)", text)
    assert "note: look out" in text
