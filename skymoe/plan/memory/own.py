"""What *our* runtime keeps, tensor by tensor: for runs of `skymoe train`, above all on a CPU.

The formulas of `activation.py` are those of the frameworks that published runs used. Ours keeps other things, because
its modules are other autograd functions (ops/, model/, parallel/). Bytes of one micro-batch on one rank; N tokens, n
of them on the rank's residual stream (N/t with sequence parallelism), D width, e bytes of an element in products (4 in
fp32, 2 under bf16 autocast), R rows that its experts take, primes for the rank's share:

    norm              input 4 n D, scale 4 n; its output where a product reads it, gathered: e N D
    attention         q, k, v, out: e N (2 H' + 2 G') C, statistics 4 N H'; in bf16 up to 512 tokens the probabilities
                      e N H' T instead of statistics, as there is no fused kernel that short
    dense             gate, silu(gate), up, product: 4 e N F'
    router            its input in fp32 4 n D, and 12 E + 40 K per token: logits, probabilities, choices, places
    experts           rows, gate and up, product, output: e R (D + 2 F' + F' + D); in bf16 every expert's rows are
                      rounded up to 64
    bf16              and the bf16 copies of the weights that were multiplied, once per micro-batch alive: 2 per element

While a part runs backward its gradients are alive beside that, at most (t_s below) those of the largest product and of
its weight, before it is added to `.grad`. The head forms its gradient in the forward pass: two tables V' D in fp32 and
the logits of a chunk of tokens, all gone before the next micro-batch. A table's gradient is formed whole.

Of the levels of recomputation the runtime has whole layers only; `selective` and `moe_act` are counted as none.

Left out: what zero-bubble schedules put off (a weight's gradient waits with both its factors), balance losses, gloo's
buffers. No torch here; tests/plan/test_own_runs.py holds it to what ranks really hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.memory.activation import element_bytes, routed_rows
from skymoe.plan.memory.reserve import reserve_bytes
from skymoe.plan.memory.sizes import Size, Sizes
from skymoe.plan.memory.static import (
    Parameters,
    attention_parameters,
    columns,
    embedding_parameters,
    ffn_parameters,
    head_parameters,
    heads,
    static_bytes,
)  # fmt: skip
from skymoe.plan.shape import AttentionShape, FfnShape, LayerShape
from skymoe.plan.work import Recompute, Work
from skymoe.spec.split import Split

WIDE = 4.0
"""Bytes of an element of the residual stream, of norms and gates."""
_SHORT, _ROW_MULTIPLE, _CHUNK_LOGITS = 512, 64, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one half: from forward to backward, and beside that while it runs backward."""

    kept: float
    running: float


def own_sizes(work: Work) -> Sizes:
    """Bytes of every part on the fullest rank of a stage, in the runtime of this package. Units as in `sizes`."""
    layers = {layer: _layer(work, layer) for layer in dict.fromkeys(work.shape.layers)}
    return Sizes(
        halves=tuple(half for layer in work.shape.layers for half in layers[layer]),
        embedding=_embedding(work),
        head=_head(work),
        reserve=reserve_bytes(work),
        boundary=WIDE * _rows(work) * work.shape.hidden_size,
    )


def _layer(work: Work, layer: LayerShape) -> tuple[Size, Size]:
    dim, division = work.shape.hidden_size, work.division
    checkpoint = WIDE * _rows(work) * dim
    parameters = attention_parameters(layer.attention, dim, division.tp), ffn_parameters(layer.ffn, dim, division)
    kept = attention_kept(work, layer.attention), ffn_kept(work, layer.ffn)
    if work.recompute is Recompute.FULL:
        whole = sum(half.kept for half in kept) - checkpoint
        running = whole + max(half.running for half in kept)
        kept = Kept(kept=checkpoint, running=running), Kept(kept=0.0, running=running)
    attention, ffn = (_size(work, own, half, checkpoint) for own, half in zip(parameters, kept, strict=True))
    return attention, ffn


def _size(work: Work, own: Parameters, kept: Kept, checkpoint: float) -> Size:
    static = static_bytes(own, work.division)
    return Size(
        weights=static.weights, gradients=static.gradients, optimizer=static.optimizer,
        activation=kept.kept, checkpoint=checkpoint, transient=kept.running,
    )  # fmt: skip


def attention_kept(work: Work, shape: AttentionShape) -> Kept:
    """The attention half."""
    size, tokens, dim = element_bytes(work), work.tokens, work.shape.hidden_size
    q, kv = heads(shape, work.division.tp)
    inner = tokens * size * (2 * q + 2 * kv) * shape.head_dim
    if work.precision is Precision.FP32 or work.sequence_length > _SHORT:
        statistics = WIDE * tokens * q
    else:
        statistics = size * tokens * q * work.sequence_length
    weights = _casts(work, attention_parameters(shape, dim, work.division.tp).total)
    kept = _norm(work) + size * tokens * dim + inner + statistics + weights
    return Kept(kept=kept, running=WIDE * _rows(work) * dim + inner)


def ffn_kept(work: Work, shape: FfnShape) -> Kept:
    """The feed-forward half."""
    size, tokens, dim, rows = element_bytes(work), work.tokens, work.shape.hidden_size, _rows(work)
    weights = _casts(work, ffn_parameters(shape, dim, work.division).total)
    arriving = WIDE * rows * dim + (size * tokens * dim if work.division.tp > 1 else 0.0)
    if not shape.is_moe:
        inner = columns(shape.inner, work.division.tp)
        kept = _norm(work) + size * tokens * (dim + 4 * inner) + weights
        running = max(size * tokens * inner + WIDE * dim * inner, 2 * size * tokens * inner)
        return Kept(kept=kept, running=arriving + running)
    own = Split.remainder_first(shape.num_experts, work.division.ep).sizes[0]
    width, routed = columns(shape.inner, work.division.etp), routed_rows(work, shape)
    if work.precision is Precision.BF16:
        routed += own * (_ROW_MULTIPLE - 1) / 2
    gate = rows * (WIDE * dim + 12 * shape.num_experts + 40 * shape.top_k)
    kept = _norm(work) + gate + size * routed * (2 * dim + 3 * width) + weights
    if shape.shared_inner:
        kept += size * tokens * (dim + 4 * columns(shape.shared_inner, work.division.tp)) + size * rows * dim
    matrix = WIDE * own * width * dim
    running = max(
        3 * size * routed * dim, size * routed * width + matrix, size * routed * (4 * width - dim),
        2 * matrix - size * routed * width,
    )  # fmt: skip
    return Kept(kept=kept, running=arriving + running)


def _embedding(work: Work) -> Size:
    own = embedding_parameters(work.shape, work.division.tp)
    tables = WIDE * work.sequence_length * work.shape.layers[0].attention.head_dim if work.shape.layers else 0.0
    return _size(work, own, Kept(kept=tables, running=WIDE * own.total), 0.0)


def _head(work: Work) -> Size:
    own, dim, tokens = head_parameters(work.shape, work.division), work.shape.hidden_size, work.tokens
    rows = Split.remainder_first(work.shape.vocab_size, work.division.tp).sizes[0]
    chunk = max(1, _CHUNK_LOGITS // rows)
    logits = WIDE * min(tokens, chunk) * rows * (2 if tokens <= chunk else 3)
    tables = rows * dim * (2 * WIDE if work.precision is Precision.FP32 else WIDE + 2 * 2.0)
    running = logits + tables + element_bytes(work) * tokens * dim * 2
    return _size(work, own, Kept(kept=_norm(work), running=running), 0.0)


def _norm(work: Work) -> float:
    return WIDE * _rows(work) * (work.shape.hidden_size + 1)


def _rows(work: Work) -> float:
    """Tokens of the residual stream on a rank."""
    return work.tokens / work.division.tp if work.division.sequence_parallel else work.tokens


def _casts(work: Work, parameters: float) -> float:
    """Copies of weights in the format of products, which autograd keeps."""
    return 2.0 * parameters if work.precision is Precision.BF16 and work.division.weight_bytes > 2 else 0.0
