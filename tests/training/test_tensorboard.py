"""What TensorBoard shows of a run: losses first, single groups last, the configuration, a row in the table of runs."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import run, write_profile


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("runs")
    assert run(write_profile(folder), "--run-dir", str(folder / "run")).code == 0
    found = EventAccumulator(str(folder / "run"))
    found.Reload()
    return found


def test_charts_of_single_groups_stand_below_those_of_all(events: EventAccumulator) -> None:
    names = sorted(events.Tags()["scalars"])
    of_groups = [name for name in names if name[-1].isdigit()]
    assert {"z_kl_vals/layer_0", "z_kl/active_1", "z_kl_coeff/layer_0", "z_val_active/layer_1"} <= set(of_groups)
    assert names[-len(of_groups) :] == of_groups and {"train/loss", "val/nelbo", "kl_coeff/coeff"} <= set(names)


def test_the_configuration_is_a_text_and_a_finished_run_a_row_with_its_final_figures(events: EventAccumulator) -> None:
    (text,) = events.Tensors("configuration/text_summary")
    assert b"total_batch = 8" in text.tensor_proto.string_val[0]
    held_out, final = (events.Scalars(name)[-1].value for name in ("val/nelbo", "final/nelbo"))
    assert held_out == final
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"training.total_batch" in plugin and b"model.latents" in plugin
