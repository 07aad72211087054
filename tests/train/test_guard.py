from __future__ import annotations

import json
import math

import pytest

from skymoe.train.guard import Action, Guard
from skymoe.train.upkeep_config import GuardConfig

STEADY = [2.0, 2.1, 1.9, 2.05]


def guard(**changes) -> Guard:
    return Guard(GuardConfig(**{"spike_window": 4, "spike_sigma": 3.0, **changes}))


def feed(watch: Guard, losses) -> list[Action]:
    return [watch.judge(loss, 1.0).action for loss in losses]


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
@pytest.mark.parametrize("action", ["skip", "rollback", "raise"])
def test_what_is_not_finite_takes_the_action_of_the_recipe(loss, norm, action):
    verdict = guard(non_finite=action).judge(loss, norm)
    assert verdict.action is Action(action)
    assert "not finite" in verdict.reason


def test_no_spike_before_the_window_is_full():
    assert feed(guard(), [2.0, 50.0, 2.0, 2.0]) == [Action.ACCEPT] * 4


def test_a_spike_is_refused_and_does_not_widen_the_window():
    watch = guard()
    assert feed(watch, STEADY) == [Action.ACCEPT] * 4
    limit = watch.limit()
    assert feed(watch, [50.0, 50.0]) == [Action.SKIP] * 2
    assert watch.limit() == limit
    assert feed(watch, [2.0]) == [Action.ACCEPT]
    assert (watch.consecutive, watch.skipped) == (0, 2)


def test_the_limit_is_mean_plus_sigma_deviations():
    watch = guard()
    feed(watch, STEADY)
    mean = sum(STEADY) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in STEADY) / 4)
    assert watch.limit() == pytest.approx(mean + 3 * deviation)


def test_a_constant_loss_still_has_a_tolerance():
    watch = guard()
    assert feed(watch, [2.0] * 5 + [2.001]) == [Action.ACCEPT] * 6


def test_ignore_lets_spikes_pass_but_not_nan():
    watch = guard(spike="ignore")
    assert feed(watch, [*STEADY, 50.0, math.nan]) == [Action.ACCEPT] * 5 + [Action.SKIP]


def test_too_many_bad_steps_in_a_row_raise():
    watch = guard(max_consecutive=3)
    assert feed(watch, [math.nan] * 4) == [Action.SKIP] * 3 + [Action.RAISE]


def test_rollbacks_to_one_generation_are_counted_even_with_good_steps_between():
    watch = guard(non_finite="rollback", max_consecutive=2)
    actions = feed(watch, [2.0, math.nan, 2.0, math.nan, 2.0, math.nan])
    assert actions[1::2] == [Action.ROLLBACK, Action.ROLLBACK, Action.RAISE]


def test_the_state_returns_through_json():
    watch, other = guard(), guard()
    feed(watch, [*STEADY, 0.1 + 0.2, math.nan])
    other.restore(json.loads(json.dumps(watch.state())))
    assert other.state() == watch.state()
    assert other.limit() == watch.limit()
