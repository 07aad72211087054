"""From the section `parallel` of a recipe, or the plan file that it names, to a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skymoe.base.errors import ConfigError
from skymoe.parallel.config import ParallelConfig, layout_of
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.plan_file import Plan, write_plan
from skymoe.spec.split import Split

SPEC = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=13, hidden_size=8, num_layers=7, ffn_size=12, num_heads=4,
    num_kv_heads=4, head_dim=2, moe=MoESpec(num_experts=5, top_k=2, ffn_size=12),
)  # fmt: skip
PLANNED = Layout(
    pp=3, tp=2, dp=2, expert=ExpertAxis.EP, dispatch=DispatchMode.ALL_TO_ALL, schedule=ScheduleKind.INTERLEAVED,
    stages=Split((3, 2, 2, 3, 2, 2)), recompute=(2, 0, 1, 0, 0, 0),
)  # fmt: skip
BESIDE: dict[str, Any] = {
    "pp": 3, "tp": 2, "dp": 2, "expert": ExpertAxis.EP, "dispatch": DispatchMode.ALL_TO_ALL, "chunks": 2,
    "schedule": ScheduleKind.INTERLEAVED, "split": (1.5, 1.0, 1.0, 1.5, 1.0, 1.0),
}  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(Plan(7, PLANNED), path)
    return path


def test_by_hand() -> None:
    config = ParallelConfig(pp=2, tp=2, split=(4.5, 2.5), expert=ExpertAxis.ETP)
    layout = layout_of(config, SPEC, world_size=12, recompute=3)
    assert layout.dp == 3 and layout.stages == Split((9, 5)) and layout.recompute == (3, 0)
    assert layout.expert is ExpertAxis.ETP and layout.dispatch is DispatchMode.GATHERED


def test_a_plan_gives_the_layout(plan: Path) -> None:
    assert layout_of(ParallelConfig(plan=plan), SPEC, world_size=12) == PLANNED


@pytest.mark.parametrize("key", BESIDE)
def test_what_agrees_may_stand_beside_it(plan: Path, key: str) -> None:
    config = ParallelConfig(plan=plan, **{key: BESIDE[key]})
    assert layout_of(config, SPEC, world_size=12, recompute=[2, 0, 1, 0, 0, 0]) == PLANNED


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pp", 2, "parallel.pp is 2, the plan .* says 3"),
        ("dp", 3, "parallel.dp is 3, the plan .* says 2"),
        ("expert", ExpertAxis.ETP, "parallel.expert is etp, the plan .* says ep"),
        ("dispatch", DispatchMode.REPLICATED, "parallel.dispatch is R, the plan .* says A"),
        ("chunks", 3, "parallel.chunks is 3, the plan .* says 2"),
        ("split", (7.0,), r"parallel.split is \[7.0\], the plan .* says \[1.5, 1.0"),
    ],
)
def test_what_disagrees_is_named_with_the_plan(plan: Path, key: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        layout_of(ParallelConfig(plan=plan, **{key: value}), SPEC, world_size=12)


def test_recomputation_too(plan: Path) -> None:
    with pytest.raises(ConfigError, match=r"recompute is all, the plan .* says \[2, 0, 1, 0, 0, 0\]"):
        layout_of(ParallelConfig(plan=plan), SPEC, world_size=12, recompute="all")


def test_a_plan_for_other_ranks_or_another_model(plan: Path) -> None:
    with pytest.raises(ConfigError, match=r"pp 3 x dp 2 x tp 2 is not the number of ranks, 24"):
        layout_of(ParallelConfig(plan=plan), SPEC, world_size=24)
    other = ModelSpec(**{**vars(SPEC), "num_layers": 8})
    with pytest.raises(ConfigError, match="for a model of 7 layers, the model has 8"):
        layout_of(ParallelConfig(plan=plan), other, world_size=12)


@pytest.mark.parametrize(
    ("config", "world_size"), [(ParallelConfig(pp=2), 3), (ParallelConfig(dp=2), 3), (ParallelConfig(tp=4), 2)]
)
def test_ranks_that_do_not_divide(config: ParallelConfig, world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"is not the number of ranks, {world_size}"):
        layout_of(config, SPEC, world_size=world_size)
