"""Anomaly scores: what later groups have to say that earlier ones did not foresee."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from data_files import write_folder
from generation_runs import RGB, demo_run, images_for, responsive
from hypothesis import given
from hypothesis import strategies as st

from nvae_lowmem.commands import anomaly as command
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.evaluation.anomaly import anomaly_scores, auroc


def test_the_elbo_beside_the_score_is_a_bound_of_its_own_kind() -> None:
    model, images = responsive(RGB), images_for(RGB, 4)
    found = anomaly_scores(model, images, groups_from_prior=1, draws=2)
    assert found.score.shape == found.elbo.shape == (4,) and found.map.shape == (4, 16, 16)
    whole = found.map.sum((1, 2))
    assert (found.score < whole).all()  # the score also pays for what its groups say: their KL


def test_scores_do_not_depend_on_how_images_share_passes() -> None:
    model, images = responsive(RGB), images_for(RGB, 5)
    together, apart = (anomaly_scores(model, images, 1, draws=2, micro_batch=size) for size in (5, 2))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("groups", [0, 3])
def test_as_many_groups_as_the_model_has_cannot_come_from_the_prior(groups: int) -> None:
    with pytest.raises(ConfigError, match=f"--groups {groups}: must be from 1 to 2"):
        anomaly_scores(responsive(RGB), images_for(RGB, 1), groups)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_in_the_right_order(normal: list[int], anomalous: list[int]) -> None:
    pairs = [(a > n) + 0.5 * (a == n) for n in normal for a in anomalous]
    assert auroc(torch.tensor(normal), torch.tensor(anomalous)) == pytest.approx(sum(pairs) / len(pairs))


def test_the_command_writes_a_table_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = demo_run(tmp_path / "run")
    write_folder(tmp_path / "pictures", count=5)
    arguments = [str(tmp_path / "pictures"), "--run", str(run), "--draws", "1", "--compare", "4"]
    assert command.main(arguments) == 0
    with (run / "anomalies" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == [f"{i:03d}.png" for i in range(5)]
    scores = [float(row["score_nats"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert (run / "anomalies" / "anomalies.png").stat().st_size > 1000
    assert "95th percentile" in capsys.readouterr().out
