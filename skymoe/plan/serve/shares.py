"""Shares: which units of a model each GPU has, and the bytes that follow. How they are chosen is in `divide.py`."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.serve.model import Served


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Units per GPU, in the first layer; where the remainder goes round by layer, `mean_*` is what memory sees.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads held (replicas included).
        columns: of every routed expert (cut) or of the dense feed-forward.
        experts: whole experts; all of them where experts are cut.
        dense_columns: of the dense feed-forwards in a mixture of experts.
        shared_columns: of shared experts.
        rows: of embedding and head.
        mean_heads, mean_kv_heads, mean_columns, mean_experts: over layers.
        block: columns that are never cut apart.
        whole: experts are not cut.
        rotated: the remainder goes round by layer.
        replicas: GPUs that hold the same key/value head; 1 when none is replicated.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    columns: tuple[int, ...]
    experts: tuple[int, ...]
    dense_columns: tuple[int, ...]
    shared_columns: tuple[int, ...]
    rows: tuple[int, ...]
    mean_heads: tuple[float, ...]
    mean_kv_heads: tuple[float, ...]
    mean_columns: tuple[float, ...]
    mean_experts: tuple[float, ...]
    block: int
    whole: bool
    rotated: bool
    replicas: int

    @property
    def num_gpus(self) -> int:
        """GPUs."""
        return len(self.heads)


def weight_bytes(served: Served, shares: Shares, gpu: int) -> float:
    """Weights on one GPU."""
    shape, width = served.shape, served.shape.hidden_size
    elements = shape.num_layers * (
        shares.mean_heads[gpu] * served.query_elements
        + shares.mean_kv_heads[gpu] * served.kv_elements
        + served.common_elements
    )
    routers = 0.0
    for layer, count in served.kinds:
        ffn = layer.ffn
        if ffn.is_moe:
            routed = shares.mean_experts[gpu] * shares.mean_columns[gpu]
            elements += count * ffn.matrices * width * (routed + shares.shared_columns[gpu])
            routers += count * width * ffn.num_experts
        else:
            part = shares.dense_columns[gpu] if served.expert_ffn else shares.mean_columns[gpu]
            widest = served.dense_ffn
            assert widest is not None
            elements += count * ffn.matrices * width * part * ffn.inner / widest.inner
    ends = shares.rows[gpu] * width * (1 if shape.tied else 2) + width * shape.positions
    return elements * served.weight_bytes + (ends + routers) * served.head_bytes


def kv_token_bytes(served: Served, shares: Shares, gpu: int) -> float:
    """Keys and values of one token on one GPU, all layers."""
    return served.shape.num_layers * (shares.mean_kv_heads[gpu] * served.kv_head_bytes + served.common_kv_bytes)
