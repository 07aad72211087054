"""What a recipe says about ranks: its section `parallel`, and the Layout that follows from it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from skymoe.base.config import Config
from skymoe.base.errors import ConfigError
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.spec.plan_file import read_plan
from skymoe.spec.split import Split


class ParallelConfig(Config):
    """How the work is divided. The number of ranks is the launcher's; it must be pp * dp * tp.

    Attributes:
        pp, tp: pipeline and tensor parallel size.
        dp: data parallel size; None takes what is left of the ranks.
        expert: `edp` (experts over tp), `ep` (over dp x tp) or `etp` (over dp, each cut by tp).
        dispatch: `R` (replicated tokens), `G` (all-gather, reduce-scatter) or `A` (all-to-all). G and A divide the
            tokens outside attention over tp (sequence parallelism).
        schedule: `1f1b`, `interleaved` or `zbv`.
        chunks: stages per rank under `interleaved`.
        split: layers per stage, over all stages in the order of the model; x.5 cuts a layer between attention and
            feed-forward. None divides as evenly as it goes, the first stages taking the remainder.
        plan: a plan file that gives the layout (docs/plan_file.md); keys beside it that are not at their defaults must
            agree with it.
        gradients: format in which gradients are kept and reduced.
        overlap: hide communication behind computation where it can be: metadata of the dispatch, reduce-scatter of
            gradients in the pipeline's cool-down, all-gather of weights in its warm-up.
        dispatch_chunks: parts in which tokens are sent and multiplied, so that one travels while another is multiplied.
        timeout_s: how long a rank waits for the others before the run is stopped.
    """

    pp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    dp: int | None = Field(default=None, ge=1)
    expert: ExpertAxis = ExpertAxis.EDP
    dispatch: DispatchMode = DispatchMode.GATHERED
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    chunks: int = Field(default=2, ge=2)
    split: tuple[float, ...] | None = None
    plan: Path | None = None
    gradients: Literal["float32", "bfloat16"] = "float32"
    overlap: bool = True
    dispatch_chunks: int = Field(default=1, ge=1)
    timeout_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _split_is_in_halves(self) -> Self:
        if self.split is not None and any(size < 0 or (2 * size) % 1 for size in self.split):
            raise ValueError(f"split counts layers in halves (5, 4.5, ..), got {list(self.split)}")
        return self


def layout_of(
    config: ParallelConfig, spec: ModelSpec, *, world_size: int, recompute: str | int | Sequence[int] = "none"
) -> Layout:
    """The layout that a recipe asks for.

    Args:
        config: its section `parallel`.
        spec: the model.
        world_size: ranks there are.
        recompute: `none`, `all`, the first N layers of the model, or a number of layers for each stage.

    Raises:
        ConfigError: the ranks or the model cannot be divided so.
    """
    if config.plan is not None:
        layout = _planned(config, config.plan, spec, recompute)
        sizes = f"pp {layout.pp} x dp {layout.dp} x tp {layout.tp}"
        where, hint = f"parallel.plan ({config.plan})", "launch as many processes as the product"
    else:
        dp = config.dp or world_size // (config.pp * config.tp) or 1
        stages = _stages(config, spec)
        layout = Layout(
            pp=config.pp, dp=dp, tp=config.tp, expert=config.expert, dispatch=config.dispatch,
            schedule=config.schedule, stages=stages, recompute=_recompute(recompute, stages),
        )  # fmt: skip
        sizes = f"pp {config.pp} x dp {config.dp or '?'} x tp {config.tp}"
        where, hint = "parallel", "launch as many processes as the product, or leave parallel.dp out"
    if layout.world_size != world_size:
        raise ConfigError(f"{sizes} is not the number of ranks, {world_size}", where=where, hint=hint)
    layout.check(spec)
    return layout


def _planned(config: ParallelConfig, path: Path, spec: ModelSpec, recompute: str | int | Sequence[int]) -> Layout:
    """The layout of the plan file, with which everything that the recipe says beside it agrees."""
    plan = read_plan(path)
    layout = plan.layout
    if plan.num_layers != spec.num_layers:
        raise ConfigError(
            f"the plan is for a model of {plan.num_layers} layers, the model has {spec.num_layers}", where=path
        )
    told: dict[str, object] = {
        "pp": layout.pp, "dp": layout.dp, "tp": layout.tp, "expert": layout.expert, "dispatch": layout.dispatch,
        "schedule": layout.schedule, "split": tuple(size / 2 for size in layout.stages.sizes),
    }  # fmt: skip
    if layout.schedule is ScheduleKind.INTERLEAVED:
        told["chunks"] = layout.num_stages // layout.pp
    for key, planned in told.items():
        asked, silent = getattr(config, key), ParallelConfig.model_fields[key].default
        if asked not in (silent, planned):
            raise _disagreement(f"parallel.{key}", asked, path, planned)
    if recompute != "none" and _recompute(recompute, layout.stages) != layout.recompute:
        raise _disagreement("recompute", recompute, path, layout.recompute)
    return layout


def _disagreement(key: str, asked: object, path: Path, planned: object) -> ConfigError:
    def shown(value: object) -> str:
        return str(list(value)) if isinstance(value, tuple) else str(value)

    return ConfigError(
        f"{key} is {shown(asked)}, the plan {path} says {shown(planned)}",
        where=key,
        hint=f"leave {key} out: the plan gives it",
    )


def _stages(config: ParallelConfig, spec: ModelSpec) -> Split:
    per_rank = {ScheduleKind.ONE_F_ONE_B: 1, ScheduleKind.INTERLEAVED: config.chunks, ScheduleKind.ZERO_BUBBLE: 2}
    num_stages = config.pp * per_rank[config.schedule]
    if config.split is None:
        whole_layers = num_stages <= spec.num_layers
        units = spec.num_layers if whole_layers else 2 * spec.num_layers
        split = Split.remainder_first(units, num_stages)
        return split.scaled(2) if whole_layers else split
    if len(config.split) != num_stages:
        raise ConfigError(
            f"{len(config.split)} stages, but pp {config.pp} with schedule {config.schedule} has {num_stages}",
            where="parallel.split",
        )
    return Split(tuple(round(2 * size) for size in config.split))


def _recompute(asked: str | int | Sequence[int], stages: Split) -> tuple[int, ...]:
    layers = [{unit // 2 for unit in part} for part in stages]
    if isinstance(asked, Sequence) and not isinstance(asked, str):
        if len(asked) != stages.num_ranks:
            raise ConfigError(f"{len(asked)} counts for {stages.num_ranks} stages", where="recompute")
        for stage, count in enumerate(asked):
            if count > len(layers[stage]):
                raise ConfigError(f"{count} layers of {len(layers[stage])} in stage {stage}", where="recompute")
        return tuple(asked)
    first = {"none": 0, "all": stages.num_units}.get(str(asked), asked)
    return tuple(sum(layer < int(first) for layer in part) for part in layers)
