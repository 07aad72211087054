"""A plan file: the layout of a training run as JSON, so that who plans and who trains need not be the same program.

    {"format": "skymoe-plan", "version": 1, "model": {"layers": 7},
     "layout": {"pp": 3, "dp": 2, "tp": 2, "expert": "edp", "dispatch": "A", "schedule": "1f1b",
                "split": [3, 2.5, 1.5], "recompute": [1, 0, 0]},
     "expected": {"step_s": 1.25}}

A recipe names it (`parallel.plan`). It comes from a planner, from a person, or from a stranger, so it is read strictly:
no unknown key, no missing one, bounded sizes, one format and version. What a planner foretold is carried along under
`expected` for those who compare it with what happened; it decides nothing. See docs/plan_file.md. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from skymoe.base.document import Document
from skymoe.base.errors import FormatError, SkymoeError
from skymoe.base.files import write_atomic
from skymoe.base.problems import explain
from skymoe.base.strict_json import read_json_object
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.split import Split
from skymoe.spec.timeline import layout_fields

FORMAT, VERSION = "skymoe-plan", 1
MAX_RANKS = 1 << 20
_MAX_LAYERS = 1 << 10
_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Plan:
    """What a plan file says.

    Attributes:
        num_layers: of the model it is for.
        layout: the division.
        expected: what the planner foretold, by name.
    """

    num_layers: int
    layout: Layout
    expected: Mapping[str, Any] = field(default_factory=dict)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Model(_Section):
    layers: int = Field(ge=1, le=_MAX_LAYERS)


class _Layout(_Section):
    pp: int = Field(ge=1, le=MAX_RANKS)
    dp: int = Field(ge=1, le=MAX_RANKS)
    tp: int = Field(ge=1, le=MAX_RANKS)
    expert: ExpertAxis
    dispatch: DispatchMode
    schedule: ScheduleKind
    split: tuple[float, ...] = Field(min_length=1, max_length=2 * _MAX_LAYERS + 2)
    recompute: tuple[int, ...] = Field(max_length=2 * _MAX_LAYERS + 2)


class _File(_Section):
    format: Literal["skymoe-plan"]
    version: Literal[1]
    model: _Model
    layout: _Layout
    expected: dict[str, JsonValue] = {}


def read_plan(path: Path) -> Plan:
    """The plan in the file `path`.

    Raises:
        FormatError: no readable JSON, no plan, another version, or a division that cannot be.
    """
    data = read_json_object(path, max_bytes=_MAX_BYTES)
    if data.get("format") != FORMAT:
        raise FormatError("this is no plan of skymoe", where=path, why=f'it does not say "format": "{FORMAT}"')
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise FormatError(
            f"only version {VERSION} of the plan format is known", where=path, hint="plan again with this skymoe"
        )
    try:
        content = _File.model_validate_json(json.dumps(data))
        return Plan(content.model.layers, _layout(content), content.expected)
    except ValidationError as error:
        told: SkymoeError = explain(error, _File, Document(data, {(): str(path)}), str(path))
    except SkymoeError as error:
        told = error
    raise FormatError(told.what, where=path, why=told.why, hint=told.hint) from told


def plan_fields(plan: Plan) -> dict[str, Any]:
    """What stands in the file."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"layers": plan.num_layers},
        "layout": layout_fields(plan.layout),
        "expected": dict(plan.expected),
    }


def write_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to the file `path`, which then is there whole or not at all.

    Raises:
        ConfigError, MachineError: the path cannot be used, or the system refuses.
    """
    data = plan_fields(plan)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in data.items())
    write_atomic(path, f"{{\n{lines}\n}}\n".encode())


def _layout(content: _File) -> Layout:
    given = content.layout
    if given.pp * given.dp * given.tp > MAX_RANKS:
        raise FormatError(f"pp {given.pp} x dp {given.dp} x tp {given.tp} is more than {MAX_RANKS} ranks")
    if any(size < 0 or (2 * size) % 1 for size in given.split):
        raise FormatError(f"layout.split counts layers in halves (5, 4.5, ..), got {list(given.split)[:20]}")
    if sum(given.split) != content.model.layers:
        raise FormatError(f"layout.split holds {sum(given.split):g} layers, model.layers is {content.model.layers}")
    if given.schedule is ScheduleKind.INTERLEAVED and len(given.split) < 2 * given.pp:
        raise FormatError(f"interleaved has at least two stages per rank: {2 * given.pp}, got {len(given.split)}")
    if len(given.recompute) != len(given.split):
        raise FormatError(f"layout.recompute has {len(given.recompute)} counts for {len(given.split)} stages")
    layout = Layout(
        pp=given.pp, dp=given.dp, tp=given.tp, expert=given.expert, dispatch=given.dispatch, schedule=given.schedule,
        stages=Split(tuple(round(2 * size) for size in given.split)), recompute=given.recompute,
    )  # fmt: skip
    for stage, count in enumerate(layout.recompute):
        layers = len({half.layer for half in layout.halves(stage)})
        if count > layers:
            raise FormatError(f"layout.recompute: {count} layers of the {layers} in stage {stage}")
    return layout
