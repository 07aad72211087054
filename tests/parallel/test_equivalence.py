"""Distributed = one process, for a covering subset of the equivalence matrix (parallel/covering.py).

The whole matrix: `python tests/parallel/matrix.py --all`, which also writes docs/equivalence.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from parallel.covering import Case, covering_subset
from parallel.equivalence import SPEC, compare

from skymoe.spec.layout import DispatchMode, ExpertAxis, ScheduleKind
from skymoe.spec.model import ModelSpec, QkNorm

TOLERANCE = 1e-5
ONE_EACH = {
    "tied": replace(SPEC, tie_embeddings=True),
    "norm of all heads": replace(SPEC, qk_norm=QkNorm.FULL),
    "norm per head": replace(SPEC, qk_norm=QkNorm.HEAD, o_bias=True, mlp_bias=True),
    "dense": replace(SPEC, moe=None, moe_layers=None),
    "9 heads, window": replace(SPEC, num_heads=9, num_kv_heads=9, sliding_window=6),
}


def check(case: Case, spec: ModelSpec = SPEC) -> None:
    errors = compare(case, spec)
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
