"""Held against its spec, a directory's tensors must be exactly the table's: none missing, none left over, no other
shape.

A tensor that is silently not used, or a weight that silently stays random, is how conversions go wrong (Megatron-
Bridge #4706, GPTQModel #2694, unsloth #5410). So every difference is an error, and all of them are told at once. No
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError, printable
from skymoe.spec.model import ModelSpec
from skymoe.weights.header import TensorInfo
from skymoe.weights.names import Layout, Place, detect_layout, is_harmless, tensor_table

HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT64)
_MAX_NAMED = 8


@dataclass(frozen=True)
class Match:
    """A directory that holds what its spec says.

    Attributes:
        table: file name to place, for every tensor to read.
        layout: how the experts lie in the files.
        spare_head: the file has a head although the spec ties it; it must equal the embedding (checked by the reader).
        dtype: the element type of most bytes.
    """

    table: Mapping[str, Place]
    layout: Layout
    spare_head: bool
    dtype: DType


def match_tensors(spec: ModelSpec, tensors: Mapping[str, TensorInfo], *, where: object) -> Match:
    """Check the tensors of a directory (`WeightsReader.names()`) against `spec`.

    Raises:
        FormatError: naming the tensors that are missing, left over, of another shape, or of no float type.
    """
    layout = detect_layout(tensors)
    _refuse_absurd_counts(spec, tensors, layout, where)
    table = tensor_table(spec, layout)
    extra = [name for name in tensors if name not in table and not is_harmless(name)]
    spare_head = spec.tie_embeddings and HEAD_NAME in extra
    if spare_head:
        extra.remove(HEAD_NAME)
    missing = [name for name in table if name not in tensors]
    present = [(name, place) for name, place in table.items() if name in tensors]
    shapes = [
        f"{name} is {list(tensors[name].shape)}, expected {list(place.shape)}"
        for name, place in present
        if tensors[name].shape != place.shape
    ]
    types = [f"{name} is {tensors[name].dtype}" for name, _ in present if tensors[name].dtype not in FLOATS]
    problems = [
        _told("missing", missing),
        _told("not part of this architecture", extra),
        _told("of another shape", shapes),
        _told("of a type that is not a plain float", types),
    ]
    if any(problems):
        told = "; ".join(problem for problem in problems if problem)
        raise FormatError(f"the weights do not fit config.json: {told}", where=where, hint=_hint(spec, missing, extra))
    return Match(table, layout, spare_head, _main_dtype(tensors[name] for name in table))


def _refuse_absurd_counts(spec: ModelSpec, tensors: Mapping[str, TensorInfo], layout: Layout, where: object) -> None:
    """Stop a config of 2 billion experts before a table of them is made."""
    per_layer = spec.moe.num_experts if spec.moe and layout is Layout.HUB else 1
    expected = len(spec.moe_layer_ids) * per_layer + spec.num_dense_layers
    if expected > len(tensors):
        what = f"config.json speaks of at least {expected} tensors, the files hold {len(tensors)}"
        raise FormatError(f"the weights do not fit config.json: {what}", where=where)


def _told(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(printable(name, 200) for name in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{len(names)} {what} ({shown}{more})"


def _hint(spec: ModelSpec, missing: list[str], extra: list[str]) -> str:
    if missing == [HEAD_NAME]:
        return "a model without a head of its own says tie_word_embeddings: true"
    if any(name.endswith("_scale") or name.endswith("_scale_inv") for name in extra):
        return "these are quantized weights; use the original ones"
    if extra and all(name.endswith(".bias") for name in extra):
        return f"{spec.architecture} has no such biases; is this the right config.json?"
    return ""


def _main_dtype(infos: Iterable[TensorInfo]) -> DType:
    sizes: dict[DType, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])
