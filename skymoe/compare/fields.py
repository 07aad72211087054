"""Which fields differ between two configs, and which of them change what the model computes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from skymoe.base.json_diff import changes, short
from skymoe.compare.result import FieldRow
from skymoe.spec.model import ModelSpec, RopeScaling

# A head that is tied or not is compared as a tensor; the mean that is subtracted before a softmax changes nothing.
_NO_EFFECT = (
    "architecture", "tie_embeddings", "init_std", "use_cache", "bos_id", "eos_ids*", "pad_id", "max_position",
    "moe.gate_norm.subtract_mean",
)  # fmt: skip
_OF_EXPERTS = ("moe", "moe.*", "moe_layers*", "ffn_size")
_CIRCUMSTANCES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map", "use_cache")


def compare_specs(
    left: ModelSpec, right: ModelSpec, *, experts: bool = False, unused: frozenset[str] = frozenset()
) -> list[FieldRow]:
    """The fields of ModelSpec that differ.

    Args:
        left, right: the models.
        experts: that B has experts where A is dense is expected.
        unused: fields that differ only because one of the models has a part that computes nothing.
    """
    passed = (*_NO_EFFECT, *(_OF_EXPERTS if experts else ()), *unused)
    if RopeScaling.DYNAMIC in (left.rope.scaling, right.rope.scaling):
        passed = tuple(name for name in passed if name != "max_position")
    return [_row(name, one, other, passed) for name, one, other in _changes(_plain(left), _plain(right))]


def compare_documents(left: Mapping[str, Any], right: Mapping[str, Any], *, effect: bool) -> list[FieldRow]:
    """The fields of config.json that differ. `effect`: nothing else tells what they do, so they count."""
    passed = _CIRCUMSTANCES if effect else ("*",)
    rows = [_row(name, one, other, passed) for name, one, other in _changes(dict(left), dict(right))]
    return [FieldRow(f"config.json:{row.name}", row.left, row.right, row.equal) for row in rows]


def _changes(left: dict[str, Any], right: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(change.path, change.left, change.right) for change in changes(left, right)]


def _row(name: str, left: Any, right: Any, passed: tuple[str, ...]) -> FieldRow:
    return FieldRow(name, short(left), short(right), any(fnmatchcase(name, pattern) for pattern in passed))


def _plain(spec: ModelSpec) -> dict[str, Any]:
    """The spec as plain data, with one way to say one thing."""
    data = asdict(spec) | {"architecture": spec.architecture.value, "eos_ids": list(spec.eos_ids)}
    data["moe_layers"] = list(spec.moe_layer_ids)
    data["ffn_size"] = spec.ffn_size if spec.num_dense_layers else None
    data["rope"]["scaling"] = spec.rope.scaling.value
    if spec.rope.scaling is not RopeScaling.NONE:
        data["rope"]["original_max_position"] = spec.rope.original_max_position or spec.max_position
    return data
