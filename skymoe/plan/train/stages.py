"""What a pass of each stage takes, for a given division and given layers that are run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skymoe.plan.cost.prices import Price, Prices
from skymoe.spec.split import Split


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch, per stage.

    Attributes:
        forward_s, backward_s: of the passes; the backward is whole: with weights, and with what is run again.
        weight_s: the part of the backward that is gradients of weights.
        again_s: the part of it that is run again.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    again_s: tuple[float, ...] = ()

    @property
    def input_s(self) -> tuple[float, ...]:
        """The rest of the backward: towards the input, after what is run again."""
        return tuple(b - w for b, w in zip(self.backward_s, self.weight_s, strict=True))


def again_halves(stages: Split, recompute: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The halves that each stage runs again: those of its first `recompute[s]` layers, as far as they are its own."""
    chosen = []
    for part, count in zip(stages, recompute, strict=True):
        layers = sorted({unit // 2 for unit in part})[:count]
        chosen.append(tuple(unit for unit in part if layers and unit // 2 <= layers[-1]))
    return tuple(chosen)


def stage_times(prices: Prices, stages: Split, recompute: Sequence[int]) -> StageTimes:
    """Add up the prices of each stage; the first one has the embedding, the last one the head."""
    again = again_halves(stages, recompute)
    forward = _sums(prices, stages, lambda price: price.forward_s)
    backward = _sums(prices, stages, lambda price: price.backward_s)
    weight = _sums(prices, stages, lambda price: price.weight_s)
    more = tuple(sum(prices.halves[unit].again_s for unit in units) for units in again)
    backward = [seconds + extra for seconds, extra in zip(backward, more, strict=True)]
    return StageTimes(tuple(forward), tuple(backward), tuple(weight), more)


def _sums(prices: Prices, stages: Split, seconds: Callable[[Price], float]) -> list[float]:
    sums = [sum(seconds(prices.halves[unit]) for unit in part) for part in stages]
    sums[0] += seconds(prices.embedding)
    sums[-1] += seconds(prices.head)
    return sums
