"""What a spec says about a model before a weight is read. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from skymoe.base.dtype import DType
from skymoe.inspect.result import Bytes, FlopsTable
from skymoe.spec.flops import AttentionCount, count_parameters, flops_per_token, kv_bytes_per_token, parameter_bytes
from skymoe.spec.model import ModelSpec
from skymoe.weights.index import ModelFiles

_PARTS = ("embedding", "head", "attention", "dense_ffn", "experts", "shared", "router", "norms")
_FLOP_PARTS = ("attention_projections", "attention_scores", "dense_ffn", "experts", "shared", "router", "head")


def parameters_by_part(spec: ModelSpec) -> dict[str, int]:
    """Parameters of each part that the model has."""
    counts = asdict(count_parameters(spec))
    return {name: counts[name] for name in _PARTS if counts[name]}


def shape(spec: ModelSpec) -> dict[str, Any]:
    """The fields of the spec as plain data, without those that are None or empty."""
    fields = asdict(spec) | {"moe_layers": list(spec.moe_layer_ids), "eos_ids": list(spec.eos_ids)}
    del fields["architecture"]
    if spec.num_dense_layers == 0:
        del fields["ffn_size"]  # of no meaning when every layer is MoE
    return {name: value for name, value in fields.items() if value is not None and value != []}


def flops_table(spec: ModelSpec, sequence_length: int) -> FlopsTable:
    """FLOPs per token of forward and training, both conventions."""
    causal, full = (
        [flops_per_token(spec, sequence_length, attention=kind, backward=backward) for backward in (False, True)]
        for kind in (AttentionCount.CAUSAL, AttentionCount.FULL)
    )
    parts = {name: float(value) for name, value in asdict(causal[0]).items() if name in _FLOP_PARTS and value}
    return FlopsTable(sequence_length, causal[0].total, full[0].total, causal[1].total, full[1].total, parts)


def sizes(spec: ModelSpec, files: ModelFiles | None) -> Bytes:
    """Bytes on disk, and of the weights and the cache in the usual number formats."""
    by_dtype: dict[str, int] = {}
    for info in files.tensors.values() if files else ():
        by_dtype[info.dtype.value] = by_dtype.get(info.dtype.value, 0) + info.num_bytes
    return Bytes(
        on_disk=sum(file.header.num_bytes for file in files.files) if files else None,
        files=len(files.files) if files else 0,
        by_dtype=by_dtype,
        weights={d.value: parameter_bytes(spec, d) for d in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT8_E4M3)},
        kv_cache_per_token={d.value: kv_bytes_per_token(spec, d) for d in (DType.FLOAT32, DType.BFLOAT16)},
    )
