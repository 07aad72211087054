from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skymoe.train.config import ScheduleConfig
from skymoe.train.schedule import learning_rate, ratio


def test_cosine_rises_falls_and_ends_at_the_floor():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=4, min_ratio=0.1)
    ratios = [ratio(step, 20, schedule) for step in range(20)]
    assert ratios[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in zip(ratios[3:], ratios[4:], strict=False))
    assert ratios[11] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 16)) / 2)
    assert ratios[-1] == pytest.approx(0.1)


def test_cosine_stays_at_the_floor_after_its_decay():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, decay_steps=5, min_ratio=0.2)
    assert [ratio(step, 50, schedule) for step in (6, 7, 30)] == pytest.approx([0.2, 0.2, 0.2])


def test_wsd_is_steady_then_cools_down_linearly():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=3, decay_steps=4, min_ratio=0.0)
    ratios = [ratio(step, 12, schedule) for step in range(12)]
    assert ratios[2:8] == [1.0] * 6
    assert ratios[8:] == [0.75, 0.5, 0.25, 0.0]


def test_steady_part_does_not_know_the_length_of_the_run():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=3, decay_steps=10)
    assert [ratio(step, 50, schedule) for step in range(40)] == [ratio(step, 500, schedule) for step in range(40)]


def test_rewarming_scales_the_reference_rate_and_starts_where_it_is_told():
    schedule = ScheduleConfig(kind="constant", warmup_steps=10, peak_ratio=0.5, start_ratio=0.2)
    assert learning_rate(0, 100, lr=1e-3, schedule=schedule) == pytest.approx(0.5e-3 * (0.2 + 0.8 / 10))
    assert learning_rate(10, 100, lr=1e-3, schedule=schedule) == pytest.approx(0.5e-3)


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 80),
    decay=st.none() | st.integers(1, 80),
)
def test_every_update_has_a_rate_between_zero_and_the_peak(kind, steps, warmup, decay):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, min_ratio=0.01)
    assert all(0 < ratio(step, steps, schedule) <= 1 for step in range(steps))


def test_the_recipe_and_the_decisions_import_no_torch():
    rooms = "config, model_config, schedule, guard, signals, metrics, result, resume"
    code = f"import sys; from skymoe.train import {rooms}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
