"""Measurements: what a measured process saw, written to a file and read back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measured_runs import on_card, on_cpu

from nvae_lowmem.memory.measure.measurement import Measurement, measurement_from_json, measurement_to_json


def measured(on: str) -> Measurement:
    found = (on_card() if on == "card" else on_cpu()).measured
    assert found is not None
    return found


@pytest.mark.parametrize("on", ["card", "cpu"])
def test_a_measurement_is_the_same_after_a_file(on: str) -> None:
    assert measurement_from_json(measurement_to_json(measured(on))) == measured(on)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": "x"}'])
def test_what_is_no_measurement_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        measurement_from_json(text)


def test_peaks_are_those_of_the_card_or_of_the_simulated_allocator() -> None:
    card, cpu = measured("card"), measured("cpu")
    assert card.statistics is not None and card.peaks is None
    assert card.figures.allocated_peak_bytes == card.statistics.peak_allocated_bytes
    assert card.figures.host_bytes == max(card.host_bytes)
    assert cpu.figures is cpu.peaks


def test_the_mean_leaves_out_the_first_step_which_loads_kernels() -> None:
    assert measured("card").mean_seconds == 0.375
    assert replace(measured("card"), seconds=(2.0,)).mean_seconds is None
