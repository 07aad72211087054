"""A division as others read it: units per GPU, and the plan file of `skymoe serve`."""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.config import PlanServeConfig
from skymoe.plan.serve.frontier import Fitted
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.report import BatchPoint
from skymoe.plan.serve.shares import Shares
from skymoe.plan.serve.sweep import best
from skymoe.spec.serving_plan import PlannedModel, PlannedSplit, ServingPlan


def splits(served: Served, shares: Shares) -> dict[str, tuple[int, ...]]:
    """Units per GPU in layer 0; experts only where there are some."""
    found = {
        "heads": shares.heads,
        "kv_groups": shares.kv_heads if served.kv_elements else (1,) * shares.num_gpus,
        "ffn_blocks": tuple(-(-columns // shares.block) for columns in shares.columns),
        "vocabulary": shares.rows,
    }
    return {**found, "experts": shares.experts} if served.expert_ffn else found


def rotating(gpus: Sequence[Gpu], shares: Shares) -> tuple[tuple[int, ...], ...]:
    """Sets of equal GPUs among which a remainder goes round; those without a remainder are left out."""
    if not shares.rotated:
        return ()
    kinds: dict[Gpu, list[int]] = {}
    for index, gpu in enumerate(gpus):
        kinds.setdefault(gpu, []).append(index)
    units = (shares.heads, shares.experts if shares.whole else shares.columns)
    return tuple(
        tuple(ranks) for ranks in kinds.values() if any(len({sizes[rank] for rank in ranks}) > 1 for sizes in units)
    )


def serving_plan(
    served: Served, gpus: Sequence[Gpu], fitted: Fitted, config: PlanServeConfig, context: int,
    points: Sequence[BatchPoint],
) -> ServingPlan:  # fmt: skip
    """The plan as a file holds it."""
    shape, shares, main = served.shape, fitted.shares, served.expert_ffn or served.dense_ffn
    assert main is not None
    top = best(points)
    return ServingPlan(
        model=PlannedModel(
            layers=shape.num_layers, heads=served.attention.num_heads, kv_heads=served.attention.num_kv_heads,
            columns=main.inner, experts=max(1, main.num_experts), vocabulary=shape.vocab_size,
        ),
        weights=config.weights, kv=config.kv, context=context, max_batch=top.batch if top else 1,
        kv_tokens=fitted.kv_tokens,
        split=PlannedSplit(
            heads=shares.heads, kv_heads=shares.kv_heads, columns=shares.columns,
            experts=shares.experts, vocabulary=shares.rows,
        ),
        block=shares.block, rotate=rotating(gpus, shares),
        expected={"tokens_per_s": top.tokens_per_s, "batch": top.batch} if top else {},
    )  # fmt: skip
