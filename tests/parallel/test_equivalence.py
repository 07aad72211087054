"""Distributed = one process, for a covering subset of the equivalence matrix (parallel/covering.py).

The whole matrix: `python tests/parallel/matrix.py --all`, which also writes docs/equivalence.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parallel.covering import Case, covering_subset
from parallel.equivalence import SPEC, compare

from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import ModelSpec, QkNorm
from skymoe.spec.plan_file import Plan, write_plan
from skymoe.spec.split import Split

TOLERANCE = 1e-5
ONE_EACH = {
    "tied": replace(SPEC, tie_embeddings=True),
    "norm of all heads": replace(SPEC, qk_norm=QkNorm.FULL),
    "norm per head": replace(SPEC, qk_norm=QkNorm.HEAD, o_bias=True, mlp_bias=True),
    "dense": replace(SPEC, moe=None, moe_layers=None),
    "9 heads, window": replace(SPEC, num_heads=9, num_kv_heads=9, sliding_window=6),
}


def check(case: Case, spec: ModelSpec = SPEC, **more: Any) -> None:
    errors = compare(case, spec, **more)
    assert errors["drop"] == 0.0
    for key in ("loss", "norm", "gradients", "weights", "alpha"):
        assert errors[key] <= TOLERANCE, f"{key} {errors[key]:.1e} {errors.get(f'{key}_name', '')}"
    assert errors["moments"] <= 10 * TOLERANCE  # squares of gradients of the second and third step


@pytest.mark.parametrize("case", covering_subset(), ids=str)
def test_covering_subset(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("dispatch", [DispatchMode.REPLICATED, DispatchMode.GATHERED])
def test_other_models(name: str, dispatch: DispatchMode) -> None:
    schedule = ScheduleKind.ZERO_BUBBLE if dispatch is DispatchMode.GATHERED else ScheduleKind.ONE_F_ONE_B
    check(Case(2, 2, 1, ExpertAxis.EDP, dispatch, schedule, "some", "dropless"), ONE_EACH[name])


@pytest.mark.parametrize(
    ("schedule", "split"),
    [
        (ScheduleKind.ONE_F_ONE_B, (2.5, 2.5, 2.0)),
        (ScheduleKind.ONE_F_ONE_B, (0.0, 3.5, 3.5)),
        (ScheduleKind.INTERLEAVED, (1.5, 1.0, 0.5, 1.5, 0.5, 2.0)),
        (ScheduleKind.ZERO_BUBBLE, (0.5, 1.5, 2.5, 0.5, 1.0, 1.0)),
    ],
)
def test_cuts_between_attention_and_experts(schedule: ScheduleKind, split: tuple[float, ...]) -> None:
    """Also a first stage that has the embedding only."""
    check(Case(3, 1, 1, ExpertAxis.EDP, DispatchMode.GATHERED, schedule, "some", "capacity"), split=split)


def test_chunks_and_a_plan_file(tmp_path: Path) -> None:
    """Tokens sent in three chunks; the layout from a file, as a planner writes it."""
    layout = Layout(
        pp=2, tp=2, expert=ExpertAxis.EDP, dispatch=DispatchMode.ALL_TO_ALL, stages=Split((9, 5)), recompute=(2, 0)
    )
    write_plan(Plan(num_layers=7, layout=layout), tmp_path / "plan.json")
    case = Case(2, 2, 1, ExpertAxis.EDP, DispatchMode.ALL_TO_ALL, ScheduleKind.ONE_F_ONE_B, "none", "dropless")
    check(case, plan=tmp_path / "plan.json", dispatch_chunks=3)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 2, ExpertAxis.EP, DispatchMode.GATHERED, ScheduleKind.ONE_F_ONE_B, "none", "dropless"),
        Case(1, 2, 2, ExpertAxis.EDP, DispatchMode.REPLICATED, ScheduleKind.ONE_F_ONE_B, "all", "dropless"),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["micro-batch statistics, z-loss", "one micro-batch a replica"])
def test_other_objectives(case: Case, way: str) -> None:
    """Statistics that are summed within the forward pass, as there is no pass before it."""
    assert SPEC.moe is not None
    if way == "one micro-batch a replica":
        check(case, batch={"micro_sequences": 3})
        return
    plain = replace(SPEC, moe=replace(SPEC.moe, gate_norm=None))
    check(case, plain, balance={"scope": "micro", "z_loss": 0.01})
