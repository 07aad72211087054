"""Which source comes next, so that the weights hold at every prefix and not just on average.

Drawing the source of each sample by a coin gives 7:2:1 only up to a random error that grows as sqrt(n). We lay out a
period of P slots instead, in which source s has exactly q_s of them, and repeat it for ever. Within the period the k-th
sample of source s may stand in slots floor((k-1) P/q_s) to ceil(k P/q_s) - 1, and each slot goes to the source whose
window closes first. For one processor this rule always succeeds (proportionate fairness: Baruah et al. 1996), hence

    | samples of s among the first n  -  n q_s / P |  <  1      for every n.

Weights that are ratios of small numbers (7:2:1, 0.7:0.2:0.1) are met exactly. Others are rounded to q_s / 4096 by
largest remainder, which adds less than n / 4096 to the error.

The order within the period is fixed: with a batch that is a multiple of P the same place in the batch always holds the
same source. That keeps every batch in proportion; whoever deals samples to ranks should know it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import ConfigError
from skymoe.spec.split import Split

I64 = npt.NDArray[np.int64]

MAX_PERIOD = 4096


class Interleave:
    """The repeating pattern: `quotas[s]` of every `period` samples come from source s."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = quotas_of(weights)
        self.period = sum(self.quotas)
        self.source_P = earliest_deadline(self.quotas)
        self._rank_P = np.zeros(self.period, np.int64)
        for source, quota in enumerate(self.quotas):
            self._rank_P[self.source_P == source] = np.arange(quota)
        self._quotas = np.asarray(self.quotas, np.int64)

    def locate(self, index_B: I64) -> tuple[I64, I64]:
        """The source of each sample index, and how many samples of that source come before it."""
        periods, slots = np.divmod(index_B, self.period)
        source_B = self.source_P[slots]
        return source_B, periods * self._quotas[source_B] + self._rank_P[slots]

    def count(self, num_samples: int) -> tuple[int, ...]:
        """How many of the first `num_samples` come from each source."""
        periods, rest = divmod(num_samples, self.period)
        partial = np.bincount(self.source_P[:rest], minlength=len(self.quotas))
        return tuple(int(periods * quota + extra) for quota, extra in zip(self.quotas, partial, strict=True))


def quotas_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of `weights`, in lowest terms, summing to at most MAX_PERIOD.

    Raises:
        ConfigError: no weights, one that is not positive and finite, or one below 1/4096 of the sum.
    """
    if not weights or any(not 0 < weight < math.inf for weight in weights):
        raise ConfigError(f"mixture weights must be positive numbers, got {list(weights)}")
    exact = [Fraction(repr(float(weight))) for weight in weights]  # 0.1 means 1/10, not its binary neighbour
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    quotas = tuple(number // divisor for number in whole)
    if sum(quotas) <= MAX_PERIOD:
        return quotas
    quotas = Split.weighted(MAX_PERIOD, weights).sizes
    if 0 in quotas:
        raise ConfigError(
            f"mixture weight {weights[quotas.index(0)]} is less than 1/{MAX_PERIOD} of the sum", hint="drop the source"
        )
    return quotas


def earliest_deadline(quotas: Sequence[int]) -> I64:
    """The source of each slot of one period (module docstring)."""
    quota_S = np.asarray(quotas, np.int64)
    period = int(quota_S.sum())
    placed_S = np.zeros_like(quota_S)
    source_P = np.empty(period, np.int64)
    for slot in range(period):
        release_S = placed_S * period // quota_S
        deadline_S = -(-(placed_S + 1) * period // quota_S)
        source = int(np.argmin(np.where(release_S <= slot, deadline_S, np.iinfo(np.int64).max)))
        source_P[slot] = source
        placed_S[source] += 1
    return source_P
