"""Where the time of a step goes, by cause, in seconds of an average GPU. The causes sum to the step.

arithmetic   the model's FLOPs (causal, forward and backward) at the GPU's peak: what cannot be saved
kernels      what matrix products and attention take beyond that, with norms and activations
tp, expert   tensor-parallel collectives; dispatch and combine of tokens; as far as nothing hides them
wait         for the fullest expert rank
host         kernels wait until they are launched
recompute    what is run again in the backward pass
uneven       other stages wait for the heaviest one
fill         the pipeline fills and drains, hops included
dp           gradients reduced and weights gathered, as far as nothing hides them (FSDP: in every layer)
update       clipping and the optimizer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skymoe.plan.cost.prices import Prices
from skymoe.plan.train.estimate import Estimate
from skymoe.plan.train.stages import again_halves
from skymoe.plan.work import Work
from skymoe.spec.layout import Layout
from skymoe.spec.split import Split

WORDS: Mapping[str, str] = {
    "arithmetic": "the model's arithmetic at the peak of the GPU",
    "kernels": "matrix products, attention and norms below the peak",
    "tp": "tensor-parallel communication",
    "expert": "dispatch and combine of tokens to experts",
    "wait": "waiting for the fullest expert rank",
    "host": "kernels wait for the host that launches them",
    "recompute": "layers run again in the backward pass",
    "uneven": "stages wait for the heaviest one",
    "fill": "the pipeline fills and drains",
    "dp": "gradients and weights between replicas",
    "update": "clipping and the optimizer",
}
_APART = ("tp", "expert", "wait", "host", "weights")


@dataclass(frozen=True)
class Limit:
    """A cause of lost time.

    Attributes:
        cause: key of `WORDS`.
        seconds: of an average GPU and step.
        share: of the step.
        words: the cause in words.
    """

    cause: str
    seconds: float
    share: float
    words: str


def time_by_cause(
    work: Work, prices: Prices, layout: Layout, stages: Split, recompute: Sequence[int], result: Estimate
) -> dict[str, float]:
    """Seconds of an average GPU, by the causes above."""
    parts = [dict(price.parts) for price in (*prices.halves, prices.embedding, prices.head)]
    scale = work.num_micro / work.division.pp
    spent = {name: scale * sum(part.get(name, 0.0) for part in parts) for name in {k for p in parts for k in p}}
    arithmetic = result.mfu_causal * result.step_s
    again = scale * sum(prices.halves[u].again_s for units in again_halves(stages, recompute) for u in units)
    busy = [0.0] * work.division.pp
    for stage, (forward_s, backward_s) in enumerate(zip(result.stage_forward_s, result.stage_backward_s, strict=True)):
        busy[layout.stage_owner(stage)] += work.num_micro * (forward_s + backward_s)
    mean = sum(busy) / len(busy)
    uneven = max(busy) - mean
    return {
        "arithmetic": arithmetic,
        "kernels": sum(seconds for name, seconds in spent.items() if name not in _APART) - arithmetic,
        "tp": spent.get("tp", 0.0),
        "expert": spent.get("expert", 0.0),
        "wait": spent.get("wait", 0.0),
        "host": spent.get("host", 0.0),
        "recompute": again,
        "uneven": uneven,
        "fill": result.pipeline_s - mean - uneven,
        "dp": result.end.exposed_s + spent.get("weights", 0.0),
        "update": result.end.update_s,
    }


def limits_of(causes: Mapping[str, float], step_s: float) -> tuple[Limit, ...]:
    """Causes of lost time, the largest first; below a thousandth of the step they are left out."""
    lost = sorted(((s, cause) for cause, s in causes.items() if cause != "arithmetic"), reverse=True)
    return tuple(Limit(c, s, s / step_s, WORDS[c]) for s, c in lost if s > 1e-3 * step_s)


def why_slower(loser: Mapping[str, float], winner: Mapping[str, float]) -> str:
    """The causes of which the loser has more, the largest first, with seconds; the two must be of equal tokens."""
    more = sorted(((loser[cause] - winner[cause], cause) for cause in WORDS if cause != "arithmetic"), reverse=True)
    total = sum(loser.values()) - sum(winner.values())
    named = [(s, cause) for s, cause in more[:2] if s > max(0.05 * total, 1e-6)]
    return ", ".join(f"{WORDS[cause]} +{s:.3g} s" for s, cause in named) or "equal but for rounding"
