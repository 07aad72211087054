"""The learning rate as a pure function of the step. No state, so nothing to save and nothing to get wrong on resume.

`step` counts the updates already made; the first update is step 0 and its rate is above zero.

    warm-up     start_ratio -> 1 linearly over `warmup_steps` updates
    cosine      1 -> min_ratio over `decay_steps` along half a cosine, then min_ratio
    wsd         warm-up, steady at 1, and a linear cool-down to min_ratio over the last `decay_steps` updates
    constant    1 after warm-up

`constant` and the steady part of `wsd` do not depend on the number of steps, so a run can be prolonged without a
trace in what is already trained; a cosine is another curve for every length.
"""

from __future__ import annotations

import math

from skymoe.train.config import ScheduleConfig


def learning_rate(step: int, steps: int, *, lr: float, schedule: ScheduleConfig) -> float:
    """The rate of update number `step` of `steps`; `lr` is the reference rate that `peak_ratio` scales."""
    return lr * schedule.peak_ratio * ratio(step, steps, schedule)


def ratio(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The rate as a ratio of the peak."""
    if step < schedule.warmup_steps:
        return schedule.start_ratio + (1 - schedule.start_ratio) * (step + 1) / schedule.warmup_steps
    match schedule.kind:
        case "cosine":
            length = schedule.decay_steps or max(1, steps - schedule.warmup_steps)
            done = min(1.0, (step + 1 - schedule.warmup_steps) / length)
            return schedule.min_ratio + (1 - schedule.min_ratio) * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            length = schedule.decay_steps or max(1, steps // 5)
            left = min(1.0, max(0.0, (steps - step - 1) / length))
            return schedule.min_ratio + (1 - schedule.min_ratio) * left
        case "constant":
            return 1.0
