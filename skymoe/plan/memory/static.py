"""What stays between steps: parameters of a part on one rank, and the bytes that weights, gradients and optimizer take.

Parts are cut in whole units (heads, blocks of columns, rows of the vocabulary, experts), remainder first, so the first
rank of each axis has the most; that is the default here. ZeRO (Rajbhandari et al. 2020) divides by *where a parameter
is repeated*: everything but experts over dp x cp, experts over what is left of a stage's ranks when ep and etp are
taken (`Division.expert_dp`); what tensor-parallel ranks repeat (router, compression matrices of latent attention) is
not divided by it. Norm vectors and biases are left out (below 0.1 %).
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.shape import AttentionShape, FfnShape, LayerShape, ModelShape
from skymoe.plan.work import Division
from skymoe.spec.layout import column_blocks
from skymoe.spec.split import Split


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Of one part on one rank: those that dp x cp ranks repeat, and those of experts."""

    dense: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.dense + self.experts

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(dense=self.dense + other.dense, experts=self.experts + other.experts)


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """Bytes of one part on one rank."""

    weights: float
    gradients: float
    optimizer: float


def heads(shape: AttentionShape, tp: int, rank: int = 0) -> tuple[int, int]:
    """Query heads and key/value heads of a rank. With more ranks than key/value heads these are repeated."""
    if tp <= shape.num_kv_heads:
        groups = Split.remainder_first(shape.num_kv_heads, tp).sizes[rank]
        return groups * (shape.num_heads // shape.num_kv_heads), groups
    return Split.remainder_first(shape.num_heads, tp).sizes[rank], 1


def attention_parameters(shape: AttentionShape, hidden_size: int, tp: int, rank: int = 0) -> Parameters:
    """q, k, v, o of a rank's heads; the compressing halves of latent attention on every rank."""
    q, kv = heads(shape, tp, rank)
    queries, values = q * shape.head_dim, q * shape.value_dim
    if not shape.kv_rank:
        return Parameters(dense=hidden_size * (queries + values + kv * (shape.head_dim + shape.value_dim)))
    compressed = hidden_size * (shape.q_rank + shape.kv_rank + shape.rope_dim)
    expand = (shape.q_rank or hidden_size) * queries
    expand += shape.kv_rank * q * (shape.head_dim - shape.rope_dim + shape.value_dim)
    return Parameters(dense=compressed + expand + values * hidden_size)


def ffn_parameters(
    shape: FfnShape, hidden_size: int, division: Division, *, tp_rank: int = 0, ep_rank: int = 0, etp_rank: int = 0
) -> Parameters:
    """The dense feed-forward or the shared experts cut by tp, the router whole, experts over ep and cut by etp."""
    one = shape.matrices * hidden_size
    if not shape.is_moe:
        return Parameters(dense=one * columns(shape.inner, division.tp, tp_rank))
    shared = one * columns(shape.shared_inner, division.tp, tp_rank)
    own = Split.remainder_first(shape.num_experts, division.ep).sizes[ep_rank]
    return Parameters(
        dense=hidden_size * shape.num_experts + shared,
        experts=own * one * columns(shape.inner, division.etp, etp_rank),
    )


def layer_parameters(layer: LayerShape, hidden_size: int, division: Division) -> tuple[Parameters, Parameters]:
    """Attention and feed-forward on the fullest rank."""
    attention = attention_parameters(layer.attention, hidden_size, division.tp)
    return attention, ffn_parameters(layer.ffn, hidden_size, division)


def embedding_parameters(shape: ModelShape, tp: int, rank: int = 0) -> Parameters:
    """Rows of the vocabulary, and learned positions on every rank."""
    rows = Split.remainder_first(shape.vocab_size, tp).sizes[rank]
    return Parameters(dense=shape.hidden_size * (rows + shape.positions))


def head_parameters(shape: ModelShape, division: Division, rank: int = 0) -> Parameters:
    """Rows of the vocabulary; of a tied table the copy that the last stage keeps, none without a pipeline."""
    if shape.tied and division.pp == 1:
        return Parameters()
    return Parameters(dense=shape.hidden_size * Split.remainder_first(shape.vocab_size, division.tp).sizes[rank])


def columns(inner: int, num_ranks: int, rank: int = 0) -> int:
    """Columns of a feed-forward of inner width `inner` on a rank."""
    return column_blocks(inner, num_ranks).sizes[rank] if inner else 0


def static_bytes(parameters: Parameters, division: Division, element_bytes: float = 2.0) -> StaticBytes:
    """Bytes of the parameters of a part, divided as far as the ZeRO stage says.

    ZeRO-3 in a pipeline does not gather anew for every micro-batch: weights stay whole for a step in the format of the
    products (`element_bytes`) beside the shards, and gradients add up whole (PyTorch FSDP2 as torchtitan uses it).
    """
    dense_ranks, expert_ranks = _shards(division)
    whole, shared = parameters.total, parameters.dense / dense_ranks + parameters.experts / expert_ranks
    stage = division.zero_stage
    held = whole if stage >= 3 and division.pp > 1 else 0.0
    return StaticBytes(
        weights=(shared if stage >= 3 else whole) * division.weight_bytes + held * element_bytes,
        gradients=((shared if stage >= 2 else whole) + held) * division.gradient_bytes,
        optimizer=(shared if stage >= 1 else whole) * division.optimizer_bytes,
    )


def _shards(division: Division) -> tuple[int, int]:
    """Over how many ranks ZeRO divides: dense parameters, experts."""
    dense, experts = division.dp * division.cp, division.expert_dp
    if division.zero_ranks is None:
        return dense, experts
    return min(dense, division.zero_ranks), min(experts, division.zero_ranks)
