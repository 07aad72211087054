"""What a micro-batch leaves for the backward pass, per half of a layer, on the fullest rank.

Two families, one account (bytes per token of width h, elements of 2 bytes; t tensor-parallel ranks):

    attention       input 2h, normed 2h [+ mask h]              | q, k, v, o of the rank's heads, 4 bytes of statistics
                                                                  per head; scores 5 a s with dropout, 2 a s without,
                                                                  none where fused (flash)
    feed-forward    input 2h, normed 2h [+ mask h]              | per column: 2 of what the last matrix takes, 2 of what
                                                                  the activation takes (4 with a gate)
    experts         input 2h, normed 2h, router 4 E             | k routed rows of input 2h and columns as above

Left of the bar is divided by t with sequence parallelism and whole without; right of it is the rank's share. With
dropout and without a gate this is Korthikanti et al. 2022, equations 1 to 4: s b h (10 + 24/t + 5 a s/(h t)), and
s b h (34 + 5 a s/h)/t. A routed row is kept once, sorted by expert. Rows follow tokens: k n etp/t on average, times the
imbalance of the fullest rank or the capacity factor. Expert tensor parallelism gathers rows, so their inputs are not
divided. What programs keep beside is in `runtime`.

Left out: fp8 copies of inputs, what allocators round up (see `reserve`), rotary tables, tensors of k numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.memory.runtime import Runtime
from skymoe.plan.memory.static import columns, heads
from skymoe.plan.shape import AttentionShape, FfnShape
from skymoe.plan.work import Recompute, Work
from skymoe.spec.layout import DispatchMode

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one half.

    Attributes:
        kept: to the backward pass, at the work's level of recomputation (whole layers aside).
        again: let go, and made again in the backward pass at that level.
        working: alive only while the half's backward runs: gradients, copies that travel.
    """

    kept: float
    again: float
    working: float


def element_bytes(work: Work) -> float:
    """Of an activation: 4 where everything is fp32, else 2 (fp8 products read and write bf16)."""
    return 4.0 if work.precision is Precision.FP32 else 2.0


def stream_elements(work: Work) -> float:
    """Elements of the residual stream on a rank."""
    tokens = work.tokens / work.division.tp if work.division.sequence_parallel else work.tokens
    return tokens * work.shape.hidden_size


def layer_input(work: Work) -> float:
    """Bytes of the residual stream on a rank: what is kept of a layer that is run again."""
    return stream_elements(work) * element_bytes(work)


def attention_bytes(work: Work, shape: AttentionShape) -> Kept:
    """The attention half: norm, projections, core, residual."""
    size, tokens = element_bytes(work), work.tokens
    q, kv = heads(shape, work.division.tp)
    outside, normed = _around(work)
    wide = q * (shape.head_dim + shape.value_dim) + (q if shape.kv_rank else kv) * (shape.head_dim + shape.value_dim)
    inside = tokens * size * (wide + _compressed_width(shape)) + (tokens * _FP32 * q if work.flash else 0.0)
    stored = 0.0 if work.flash else tokens * q * _seen(work, shape)
    scores = stored * (2 * size + 1 if work.shape.dropout else size)
    again = {Recompute.MOE_ACT: normed, Recompute.SELECTIVE: scores}.get(work.recompute, 0.0)
    working = max(tokens * size * wide, stored * size) + stream_elements(work) * size
    return Kept(kept=outside + normed + inside + scores - again, again=again, working=working)


def ffn_bytes(work: Work, shape: FfnShape, runtime: Runtime) -> Kept:
    """The feed-forward half: norm, dense feed-forward or router and experts, residual."""
    size, hidden = element_bytes(work), work.shape.hidden_size
    outside, normed = _around(work)
    dense = work.tokens * columns(shape.shared_inner if shape.is_moe else shape.inner, work.division.tp)
    rows = routed_rows(work, shape) if shape.is_moe else 0.0
    routed = rows * (columns(shape.inner, work.division.etp) if shape.is_moe else 0)
    before = shape.matrices - 1  # tensors of inner width that the activation takes
    inside = size * (dense * (runtime.gate_copies if shape.gated else 1) + routed * before)
    activated = size * (dense + routed)
    outputs = rows * hidden * size * (2 if runtime.routed_outputs else 1)
    router = stream_elements(work) / hidden * _FP32 * shape.num_experts
    again = normed + activated if work.recompute is Recompute.MOE_ACT else 0.0
    gradients = size * ((dense + routed) * before + 2 * rows * hidden + stream_elements(work))
    return Kept(
        kept=outside + normed + inside + activated + outputs + router - again,
        again=again,
        working=gradients + _travelling(work, shape),
    )


def routed_rows(work: Work, shape: FfnShape) -> float:
    """Rows that the experts of the fullest rank take in a micro-batch."""
    division = work.division
    mean = work.tokens * shape.top_k * division.etp / division.tp
    return mean * (work.imbalance if work.capacity is None else work.capacity)


def _around(work: Work) -> tuple[float, float]:
    """Of a norm and a residual: the input with the mask of dropout, and what the norm gives."""
    mask = stream_elements(work) if work.shape.dropout else 0.0
    return layer_input(work) + mask, layer_input(work)


def _seen(work: Work, shape: AttentionShape) -> int:
    """Columns of a row of scores that are stored."""
    return work.sequence_length if shape.window is None else min(shape.window, work.sequence_length)


def _compressed_width(shape: AttentionShape) -> int:
    """Latent attention keeps what its inner norms take and give."""
    return 2 * shape.q_rank + 2 * shape.kv_rank + shape.rope_dim if shape.kv_rank else 0


def _travelling(work: Work, shape: FfnShape) -> float:
    """Copies that travel to experts and back, beside the rows that are kept (mode A: rows; G, R: all tokens)."""
    division = work.division
    if not shape.is_moe or division.ep * division.etp == 1:
        return 0.0
    rows = routed_rows(work, shape) / division.etp if division.dispatch is DispatchMode.ALL_TO_ALL else work.tokens
    return rows * work.shape.hidden_size * element_bytes(work)
