"""One rank's share of a model directory, read straight out of the files.

Of each tensor a rank reads the rows or columns that are its own (`weights.reader`), so a model that is larger than the
memory of any rank is loaded by all of them together; a rank's peak is its share and one tensor more. The listing is
held against config.json first, whole, by the rules of every other reader here: nothing missing, nothing left over, no
other shape. Nothing in the directory is run.

FP8 weights stay codes and scales. What is no factor of a large product (norms, biases, routers, the embedding) is
decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.engine.model_files import ModelFiles
from skymoe.engine.shares import LayerShare, layer_share, vocabulary_rows
from skymoe.engine.weights import Matrix, Plain, joined
from skymoe.model.load import check_spare_head
from skymoe.spec.model import ModelSpec, QkNorm
from skymoe.spec.serving_plan import ServingPlan
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.match import match_tensors


@dataclass(frozen=True)
class AttentionWeights:
    """Of the heads of this rank: q, k and v as one matrix. Norms over all heads are cut like the heads."""

    qkv: Matrix
    qkv_bias: Tensor | None
    o: Matrix
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class SwiGLUWeights:
    """Of this rank's columns: gate and up as one matrix, the gate's rows first."""

    gate_up: Matrix
    gate_up_bias: Tensor | None
    down: Matrix


@dataclass(frozen=True)
class MoEWeights:
    """The router is whole and fp32 on every rank. `experts` are those of this rank, empty where it has no columns."""

    router_ED: Tensor
    expert_bias_E: Tensor | None
    experts: tuple[SwiGLUWeights, ...]
    shared: SwiGLUWeights | None
    shared_gate_1D: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer; None is what this rank has nothing of. Every rank has the biases of o and down, for the sums."""

    share: LayerShare
    attention_norm: Tensor
    attention: AttentionWeights | None
    o_bias: Tensor | None
    ffn_norm: Tensor
    mlp: SwiGLUWeights | None
    down_bias: Tensor | None
    moe: MoEWeights | None


@dataclass(frozen=True)
class Share:
    """All weights of one rank.

    Attributes:
        embed_VD, head: this rank's rows of the vocabulary.
        weights: number format of most matrices: "fp8", "bf16" or "fp32".
        dtype: of the activations.
    """

    embed_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Matrix
    weights: str
    dtype: torch.dtype


def load_share(
    directory: Path,
    spec: ModelSpec,
    plan: ServingPlan,
    rank: int,
    *,
    dtype: DType | None = None,
    device: torch.device | str = "cpu",
    loaded: Callable[[int, int], None] | None = None,
) -> Share:
    """The weights of `rank`.

    Args:
        directory: of the model.
        spec: as its config.json says.
        plan: the division.
        rank: whose.
        dtype: of the activations, and of weights that are not FP8: float32 or bfloat16. None: that of the files, or
            float32 where they have another type than these two.
        device: where the weights live.
        loaded: is told after each layer how many are read, and how many there are.

    Raises:
        FormatError: anything missing, left over, broken or hostile.
        ConfigError: `dtype` is another one.
    """
    decode_to = DType.FLOAT32 if dtype is DType.FLOAT32 else DType.BFLOAT16
    with DecodedReader(directory, decode_to=decode_to) as reader:
        match = match_tensors(spec, reader.names(), where=directory)
        check_spare_head(reader, match)
        kept = activation_dtype(dtype, match.dtype)
        files = ModelFiles(reader, match, torch_dtype(kept), torch.device(device))
        rows = vocabulary_rows(plan).part(rank)
        embed = files.tensor("embed.weight", rows)
        shares = [layer_share(spec, plan, layer, rank) for layer in range(spec.num_layers)]
        layers: list[LayerWeights] = []
        for layer, share in enumerate(shares):
            layers.append(_layer(files, spec, share, layer))
            if loaded is not None:
                loaded(layer + 1, spec.num_layers)
        head = Plain(embed) if spec.tie_embeddings else files.matrix("head.weight", rows)
        weights = "fp8" if reader.scaled else "fp32" if kept is DType.FLOAT32 else "bf16"
        return Share(embed, tuple(layers), files.tensor("norm.weight"), head, weights, torch_dtype(kept))


def activation_dtype(asked: DType | None, of_files: DType) -> DType:
    """What is computed in. Raises ConfigError for a type that is not served."""
    served = (DType.FLOAT32, DType.BFLOAT16)
    if asked is not None and asked not in served:
        raise ConfigError(f"dtype {asked} is not served", hint="float32 or bfloat16")
    return asked or (of_files if of_files in served else DType.FLOAT32)


def _layer(files: ModelFiles, spec: ModelSpec, share: LayerShare, layer: int) -> LayerWeights:
    at = f"layers.{layer}"
    is_moe = spec.is_moe_layer(layer)
    return LayerWeights(
        share=share,
        attention_norm=files.tensor(f"{at}.attention_norm.weight"),
        attention=_attention(files, spec, share, f"{at}.attention") if share.heads else None,
        o_bias=files.optional(f"{at}.attention.o.bias"),
        ffn_norm=files.tensor(f"{at}.ffn_norm.weight"),
        mlp=None if is_moe or not share.columns else _swiglu(files, f"{at}.mlp", share.columns),
        down_bias=files.optional(f"{at}.mlp.down.bias"),
        moe=_moe(files, spec, share, f"{at}.moe") if is_moe else None,
    )


def _attention(files: ModelFiles, spec: ModelSpec, share: LayerShare, at: str) -> AttentionWeights:
    channels = {name: _scaled(share.heads if name == "q" else share.kv_heads, spec.head_dim) for name in "qkv"}
    full = spec.qk_norm is QkNorm.FULL
    biases = [files.optional(f"{at}.{name}.bias", part) for name, part in channels.items()]
    return AttentionWeights(
        qkv=joined([files.matrix(f"{at}.{name}.weight", part) for name, part in channels.items()]),
        qkv_bias=torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None,
        o=files.matrix(f"{at}.o.weight", None, channels["q"]),
        q_norm=files.optional(f"{at}.q_norm.weight", *([channels["q"]] if full else [])),
        k_norm=files.optional(f"{at}.k_norm.weight", *([channels["k"]] if full else [])),
    )


def _swiglu(files: ModelFiles, at: str, columns: range) -> SwiGLUWeights:
    biases = [files.optional(f"{at}.{name}.bias", columns) for name in ("gate", "up")]
    return SwiGLUWeights(
        gate_up=joined([files.matrix(f"{at}.{name}.weight", columns) for name in ("gate", "up")]),
        gate_up_bias=torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None,
        down=files.matrix(f"{at}.down.weight", None, columns),
    )


def _moe(files: ModelFiles, spec: ModelSpec, share: LayerShare, at: str) -> MoEWeights:
    assert spec.moe is not None
    wide = torch.float32
    return MoEWeights(
        router_ED=files.tensor(f"{at}.router.weight", dtype=wide),
        expert_bias_E=files.tensor(f"{at}.router.expert_bias", dtype=wide) if spec.moe.expert_bias else None,
        experts=tuple(_expert(files, spec, share, at, e) for e in share.experts) if share.columns else (),
        shared=_swiglu(files, f"{at}.shared", share.shared) if share.shared else None,
        shared_gate_1D=files.optional(f"{at}.shared_gate.weight"),
    )


def _expert(files: ModelFiles, spec: ModelSpec, share: LayerShare, at: str, expert: int) -> SwiGLUWeights:
    assert spec.moe is not None
    width, columns = spec.moe.ffn_size, share.columns
    gate, up = (files.matrix(f"{at}.experts.gate_up", columns, expert=expert, start=start) for start in (0, width))
    down = files.matrix(f"{at}.experts.down", range(spec.hidden_size), columns, expert=expert)
    return SwiGLUWeights(joined((gate, up)), None, down)


def _scaled(units: range, size: int) -> range:
    return range(units.start * size, units.stop * size)
