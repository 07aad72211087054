"""The promises that a validation holds or breaks. Limits are what was aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from skymoe.plan.validate.gains import wrong_signs
from skymoe.plan.validate.result import Comparison, Gate, GroupResult, mape

MEMORY: Final = ("memory", "activations", "static_memory")
GAIN: Final = ("gain", "vocabulary_gain")


def gates_of(training: Sequence[GroupResult], inference: Sequence[GroupResult]) -> tuple[Gate, ...]:
    """All gates; those without a comparison have no value."""
    served = [comparison for group in inference for comparison in group.comparisons]
    everything = [comparison for group in training for comparison in group.comparisons]
    signs = [c for c in everything if c.quantity in GAIN]
    return (
        _gate("memory, mean error", 0.05, everything, lambda c: c.quantity in MEMORY and c.known),
        _gate("gain of non-uniform over uniform, mean error", 0.03, everything, lambda c: c.quantity == "gain"),
        Gate(
            name="gains with the wrong sign", limit=0.0, value=float(len(wrong_signs(signs))) if signs else None,
            num_cases=len(signs),
        ),
        _gate("step time, dense, fully known layout", 0.10, everything, lambda c: _step(c, moe=False, known=True)),
        _gate("step time, MoE, fully known layout", 0.15, everything, lambda c: _step(c, moe=True, known=True)),
        _gate("step time, dense, with assumptions", 0.10, everything, lambda c: _step(c, moe=False, known=False)),
        _gate("step time, MoE, with assumptions", 0.15, everything, lambda c: _step(c, moe=True, known=False)),
        _gate("inference, tokens per second", 0.20, served, lambda c: True),
    )  # fmt: skip


def _step(comparison: Comparison, *, moe: bool, known: bool) -> bool:
    return comparison.quantity == "step_time" and comparison.moe is moe and comparison.known is known


def _gate(name: str, limit: float, everything: Sequence[Comparison], belongs: Callable[[Comparison], bool]) -> Gate:
    own = [comparison for comparison in everything if belongs(comparison)]
    return Gate(name=name, limit=limit, value=mape(own) if own else None, num_cases=len(own))
