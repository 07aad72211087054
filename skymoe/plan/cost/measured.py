"""Measured seconds in place of computed ones.

A profile that timed this model at this number of tokens on one rank knows more than any law: what kernels and framework
add is in its figures. Then a half costs what was measured, scaled so that both halves make the measured layer (a whole
layer is not exactly its halves). The laws still say in which proportion a backward is gradients of weights, and what
the causes are. Where tensors are cut, or the shape, precision or number of tokens is another, the laws stay, with the
machine's constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skymoe.plan.cost.prices import Price, Prices
from skymoe.plan.hardware.fitted import gpu_from_profile
from skymoe.plan.hardware.profile import LayerKind, ModelFacts, ModelTimes, Piece, Profile
from skymoe.plan.shape import LayerShape, ModelShape
from skymoe.plan.work import Work


def on_measured(work: Work, profile: Profile) -> Work:
    """`work` on the machine that was measured, in nodes as large as before."""
    gpu = gpu_from_profile(profile, base=work.cluster.gpu)
    return replace(work, cluster=replace(work.cluster, gpu=gpu))


def with_measured(work: Work, listed: Prices, times: ModelTimes) -> Prices:
    """`listed` with what `times` has measured of it."""
    if not _same_work(work, times):
        return listed
    known: dict[LayerShape, tuple[Price, ...]] = {}
    halves: list[Price] = []
    for number, layer in enumerate(work.shape.layers):
        if layer not in known:
            computed = listed.halves[2 * number : 2 * number + 2]
            kind = next((kind for kind in times.kinds if _same_layer(layer, kind, times.model)), None)
            known[layer] = computed if kind is None else _layer(computed, kind)
        halves += known[layer]
    return replace(
        listed,
        halves=tuple(halves),
        embedding=_measured(listed.embedding, times.embedding, 1.0, 1.0),
        head=_measured(listed.head, times.head, 1.0, 1.0),
    )


def _same_work(work: Work, times: ModelTimes) -> bool:
    division = work.division
    whole = division.tp == division.cp == division.ep == division.etp == 1
    tokens = (work.sequence_length, work.micro_batch, work.precision)
    measured = (times.sequence_length, times.micro_batch, times.precision)
    return whole and tokens == measured and _same_model(work.shape, times.model)


def _same_model(shape: ModelShape, facts: ModelFacts) -> bool:
    return (shape.hidden_size, shape.vocab_size) == (facts.hidden_size, facts.vocab_size)


def _same_layer(layer: LayerShape, kind: LayerKind, facts: ModelFacts) -> bool:
    attention, ffn = layer.attention, layer.ffn
    heads = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
    if attention.kv_rank or heads != (facts.num_heads, facts.num_kv_heads, facts.head_dim):
        return False
    if ffn.is_moe != kind.is_moe or not ffn.gated:
        return False
    if not ffn.is_moe:
        return ffn.inner == facts.ffn_size
    experts = (ffn.num_experts, ffn.top_k, ffn.inner, ffn.shared_inner)
    return experts == (facts.num_experts, facts.top_k, facts.expert_size, facts.shared_size)


def _layer(computed: Sequence[Price], kind: LayerKind) -> tuple[Price, ...]:
    """Both halves, so that they make the layer."""
    pieces = (kind.attention, kind.feed_forward)
    forward = _ratio(kind.layer.forward_s, sum(piece.forward_s for piece in pieces))
    backward = _ratio(kind.layer.backward_s, sum(piece.backward_s for piece in pieces))
    again = _ratio(kind.layer.again_s, sum(piece.again_s for piece in pieces))
    return tuple(
        _measured(price, piece, forward, backward, again) for price, piece in zip(computed, pieces, strict=True)
    )


def _measured(price: Price, piece: Piece, forward: float, backward: float, again: float = 1.0) -> Price:
    """`piece` in place of `price`; what the base level runs again is added in the same proportion."""
    again_s = again * piece.again_s or forward * piece.forward_s
    share = 1.0 - price.again_s / price.forward_s if price.forward_s else 0.0
    alone_s = price.backward_s - share * price.forward_s
    forward_s, backward_s = forward * piece.forward_s, backward * piece.backward_s
    ratio = _ratio(forward_s + backward_s + share * again_s, price.forward_s + price.backward_s)
    return Price(
        forward_s=forward_s,
        backward_s=backward_s + share * again_s,
        weight_s=backward_s * _ratio(price.weight_s, alone_s),
        again_s=(1.0 - share) * again_s,
        parts={cause: seconds * ratio for cause, seconds in price.parts.items()},
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0
