"""A serving plan as a file: which rank has which heads, columns, experts and rows of one model.

    {"format": "skymoe-serving-plan", "version": 1,
     "model": {"layers": 52, "heads": 36, "kv_heads": 36, "columns": 12288, "experts": 16, "vocabulary": 65536},
     "weights": "fp8", "kv": "bf16", "context": 4096, "max_batch": 128, "kv_tokens": 44000,
     "split": {"heads": [5,5,5,5,4,4,4,4], "kv_heads": [5,5,5,5,4,4,4,4], "columns": [1536, ...], "experts": [16, ...],
               "vocabulary": [8192, ...]},
     "block": 128, "rotate": [[0,1,2,3,4,5,6,7]], "expected": {"tokens_per_s": 2200}}

`split` is that of layer 0. `rotate` names sets of ranks among which the remainder goes round: in layer l the r ranks of
a set of n that have one unit more than the others are numbers (l r + i) mod n, i < r, of the set. Every rank then has,
over all layers, as many units as its neighbours up to one. Units are key/value groups with their query heads, and
blocks of `block` columns (or whole experts, where `experts` does not name all of them on every rank). Vocabulary rows
do not rotate. Where there are more ranks than key/value heads, `kv_heads` are replicas and heads do not rotate.

`expected` decides nothing. Files are read strictly. No torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from skymoe.base.document import Document
from skymoe.base.errors import FormatError
from skymoe.base.files import write_atomic
from skymoe.base.problems import explain
from skymoe.base.strict_json import read_json_object
from skymoe.spec.split import Split

FORMAT: Final = "skymoe-serving-plan"
VERSION: Final = 1
_MAX_RANKS = 1024
_MAX_BYTES = 4 << 20

_Sizes = tuple[int, ...]


def turned(split: Split, sets: tuple[tuple[int, ...], ...], layer: int) -> Split:
    """`split` (of layer 0) as it is in `layer`."""
    sizes = list(split.sizes)
    for ranks in sets:
        total, num = sum(split.sizes[rank] for rank in ranks), len(ranks)
        share, rest = divmod(total, num)
        for place, rank in enumerate(ranks):
            sizes[rank] = share + ((place - layer * rest) % num < rest)
    return Split(tuple(sizes))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PlannedModel(_Section):
    """The model a plan is for."""

    layers: int = Field(ge=1, le=1 << 12)
    heads: int = Field(ge=1, le=1 << 16)
    kv_heads: int = Field(ge=1, le=1 << 16)
    columns: int = Field(ge=1, le=1 << 24)
    """of an expert, or of the dense feed-forward"""
    experts: int = Field(ge=1, le=1 << 16)
    """1 for a dense model"""
    vocabulary: int = Field(ge=1, le=1 << 26)


class PlannedSplit(_Section):
    """Units per rank, in layer 0."""

    heads: _Sizes = Field(min_length=1, max_length=_MAX_RANKS)
    kv_heads: _Sizes = Field(min_length=1, max_length=_MAX_RANKS)
    columns: _Sizes = Field(min_length=1, max_length=_MAX_RANKS)
    experts: _Sizes = Field(min_length=1, max_length=_MAX_RANKS)
    vocabulary: _Sizes = Field(min_length=1, max_length=_MAX_RANKS)


class ServingPlan(_Section):
    """What a serving plan says; the module's docstring explains it."""

    format: Literal["skymoe-serving-plan"] = "skymoe-serving-plan"
    version: Literal[1] = 1
    model: PlannedModel
    weights: Literal["fp32", "bf16", "fp8", "int8", "int4", "nvfp4"]
    kv: Literal["fp32", "bf16", "fp8"]
    context: int = Field(ge=1, le=1 << 30)
    max_batch: int = Field(ge=1, le=1 << 20)
    kv_tokens: int = Field(ge=0, le=1 << 40)
    split: PlannedSplit
    block: int = Field(ge=1, le=1 << 16)
    rotate: tuple[tuple[int, ...], ...] = ()
    expected: dict[str, JsonValue] = {}

    @property
    def num_ranks(self) -> int:
        """Tensor-parallel ranks."""
        return len(self.split.heads)

    @property
    def whole_experts(self) -> bool:
        """Whether ranks have some experts whole, rather than a part of each."""
        return self.model.experts > 1 and sum(self.split.experts) == self.model.experts

    def heads(self, layer: int) -> Split:
        """Query heads per rank in `layer`."""
        return self._turned(self.split.heads, self.model.heads // self.model.kv_heads, layer)

    def columns(self, layer: int) -> Split:
        """Columns per rank of every expert, or of the dense feed-forward, in `layer`."""
        return Split(self.split.columns) if self.whole_experts else self._turned(self.split.columns, self.block, layer)

    def experts(self, layer: int) -> Split:
        """Experts per rank in `layer`."""
        return self._turned(self.split.experts, 1, layer) if self.whole_experts else Split(self.split.experts)

    def _turned(self, sizes: _Sizes, unit: int, layer: int) -> Split:
        if any(size % unit for size in sizes):
            return Split(sizes)  # replicated key/value heads: query heads are dealt one by one, and stay
        return turned(Split(tuple(size // unit for size in sizes)), self.rotate, layer).scaled(unit)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ranks, model, split = self.num_ranks, self.model, self.split
        for name in ("heads", "kv_heads", "columns", "experts", "vocabulary"):
            sizes = getattr(split, name)
            if len(sizes) != ranks or min(sizes) < 0:
                raise ValueError(f"split.{name} needs {ranks} sizes that are not negative, got {list(sizes)[:20]}")
        sums = {"heads": model.heads, "vocabulary": model.vocabulary}
        if not self.whole_experts:
            sums["columns"] = model.columns
        for name, total in sums.items():
            if sum(getattr(split, name)) != total:
                raise ValueError(f"split.{name} sums to {sum(getattr(split, name))}, the model has {total}")
        if ranks <= model.kv_heads and sum(split.kv_heads) not in (model.kv_heads, 0):
            raise ValueError(f"split.kv_heads sums to {sum(split.kv_heads)}, the model has {model.kv_heads}")
        if not self.whole_experts and set(split.experts) != {model.experts}:
            raise ValueError(f"split.experts must name all {model.experts} everywhere, or sum to them")
        if self.whole_experts and set(split.columns) != {model.columns}:
            raise ValueError(f"split.columns must be all {model.columns} everywhere where experts are whole")
        if model.heads % model.kv_heads:
            raise ValueError(f"model.heads {model.heads} is no multiple of model.kv_heads {model.kv_heads}")
        turning = [rank for ranks_ in self.rotate for rank in ranks_]
        if len(set(turning)) != len(turning) or not set(turning) <= set(range(ranks)) or not all(self.rotate):
            raise ValueError("rotate names each rank at most once, in sets that are not empty")
        return self


def read_serving_plan(path: Path) -> ServingPlan:
    """The plan in the file `path`.

    Raises:
        FormatError: no readable JSON, no serving plan, another version, or a division that cannot be.
    """
    data = read_json_object(path, max_bytes=_MAX_BYTES)
    if data.get("format") != FORMAT:
        raise FormatError(
            "this is no serving plan of skymoe", where=path, why=f'it does not say "format": "{FORMAT}"',
            hint="skymoe plan serve --save FILE writes one",
        )  # fmt: skip
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise FormatError(f"only version {VERSION} of serving plans is known", where=path, hint="plan again")
    try:
        return ServingPlan.model_validate_json(json.dumps(data))
    except ValidationError as error:
        told = explain(error, ServingPlan, Document(data, {(): str(path)}), str(path))
        raise FormatError(told.what, where=path, why=told.why, hint=told.hint) from error


def write_serving_plan(plan: ServingPlan, path: Path) -> None:
    """Write `plan` to the file `path`, which then is there whole or not at all.

    Raises:
        ConfigError, MachineError: the path cannot be used, or the system refuses.
    """
    write_atomic(path, (json.dumps(plan.model_dump(mode="json"), indent=1) + "\n").encode())
