"""Price of the attention half of a layer: norm, projections, the core, output projection, residual.

Projections are cut over tp by whole key/value groups, the first ranks taking the remainder, so the slowest rank has
ceil(groups / tp) of them. Fused (flash) attention is counted by the pairs that a causal model needs; its backward pass
has 2.5 times the arithmetic (it computes the scores again: Dao 2023, section 3.1). Unfused attention computes all
pairs and sends scores through memory: per head and pair, in 2 bytes, some 4 passes forward and 8 backward, 2.5 more
each with dropout (Korthikanti et al. 2022, section 4.1 keeps 5 a s^2 b of them; the rest is traffic).

Streams, in passes over the rows of the residual stream: norm 2, residual 3, backward 3 and 3 (the gradient of the
residual is added), with dropout one more each and its mask; rotary 2 and 2 passes over queries and keys. Context
parallelism (ring): keys and values travel to each of the other ranks behind the core, twice backward.
"""

from __future__ import annotations

import math

from skymoe.plan.cost.bill import Bill, Frame, tensor_parallel
from skymoe.plan.cost.collectives import exposed
from skymoe.plan.cost.flops import keys_seen
from skymoe.plan.cost.laws import LinearTime
from skymoe.plan.shape import AttentionShape
from skymoe.plan.work import Recompute

_FLASH_BACKWARD = 2.5
HOST_LATENT = 3.0  # times the host time of a dense half: two more products, norms, parts cut and put together


def heads_of(attention: AttentionShape, tp: int) -> tuple[int, int]:
    """Query and key/value heads of the fullest rank; keys and values are repeated where tp is more than there are."""
    if tp > attention.num_kv_heads:
        return math.ceil(attention.num_heads / tp), 1
    groups = math.ceil(attention.num_kv_heads / tp)
    return math.ceil(attention.num_heads * groups / attention.num_kv_heads), groups


def attention_bill(frame: Frame, attention: AttentionShape) -> Bill:
    """The attention half."""
    bill = Bill()
    heads, groups = heads_of(attention, frame.work.division.tp)
    first = _into(frame, bill, attention, heads, groups)
    _core(frame, bill, attention, heads, groups)
    bill.linear(frame.kernels.linear(frame.tokens, heads * attention.value_dim, frame.hidden))
    tensor_parallel(frame, bill, first)
    residual_streams(frame, bill)
    bill.at_least((HOST_LATENT if attention.kv_rank else 1.0) * frame.work.cluster.gpu.laws.host_s)
    return bill


def residual_streams(frame: Frame, bill: Bill) -> None:
    """Norm and residual of one half."""
    kernels, again = frame.kernels, frame.work.recompute is Recompute.MOE_ACT
    one = frame.rows * frame.hidden * kernels.element
    bill.add("memory", kernels.memory(2 * one), kernels.memory(3 * one), again=again)
    dropout = 1.5 * one if frame.work.shape.dropout else 0.0
    bill.add("memory", kernels.memory(3 * one + dropout), kernels.memory(3 * one + dropout))


def _into(frame: Frame, bill: Bill, attention: AttentionShape, heads: int, groups: int) -> LinearTime:
    """Query, key and value projections; returns the one that is cut over tp."""
    kernels, tokens = frame.kernels, frame.tokens
    if not attention.kv_rank:
        columns = heads * attention.head_dim + groups * (attention.head_dim + attention.value_dim)
        first = kernels.linear(tokens, frame.hidden, columns)
        bill.linear(first)
        if not frame.work.shape.positions:
            turned = 2 * tokens * (heads + groups) * attention.head_dim * kernels.element
            bill.add("memory", kernels.memory(turned), kernels.memory(turned))
        return first
    queries = heads * attention.head_dim
    down = attention.q_rank + attention.kv_rank + attention.rope_dim
    bill.linear(kernels.linear(frame.rows, frame.hidden, down))
    inner = attention.head_dim - attention.rope_dim + attention.value_dim
    first = kernels.linear(tokens, attention.kv_rank, heads * inner)
    first += kernels.linear(tokens, attention.q_rank or frame.hidden, queries)
    bill.linear(first)
    # Norms of the compressed parts; rotary; queries and keys put together from their rotary and other parts.
    moved = (2 * down * frame.rows + 4 * tokens * heads * attention.head_dim) * kernels.element
    bill.add("memory", kernels.memory(moved, 4), kernels.memory(1.5 * moved, 4))
    return first


def _core(frame: Frame, bill: Bill, attention: AttentionShape, heads: int, groups: int) -> None:
    """Scores, softmax, values."""
    work, kernels = frame.work, frame.kernels
    if work.flash:
        keys = keys_seen(work.sequence_length, attention.window)
        numbers = 2 * frame.tokens * (heads + groups) * attention.head_dim
        arithmetic = 2.0 * frame.tokens * heads * (attention.head_dim + attention.value_dim) * keys / kernels.attention
        forward = max(arithmetic + kernels.launch_s, kernels.memory(numbers * kernels.element))
        backward = _FLASH_BACKWARD * arithmetic + 2 * kernels.launch_s
        backward = max(backward, kernels.memory(2 * numbers * kernels.element))
        bill.add("attention", forward, backward)
        _ring(frame, bill, attention, groups, forward, backward)
        return
    pairs = frame.tokens * heads * work.sequence_length
    product = 2.0 * pairs * attention.head_dim / kernels.rate
    scores = pairs * kernels.element / kernels.stream
    dropped = 1.0 if work.shape.dropout else 0.0
    forward = 2 * math.hypot(product, scores) + (4 + 2.5 * dropped - 2) * scores + 4 * kernels.launch_s
    backward = 4 * math.hypot(product, scores) + (4 + 2.5 * dropped) * scores + 6 * kernels.launch_s
    bill.add("attention", forward, backward, again=work.recompute is Recompute.SELECTIVE)
    _ring(frame, bill, attention, groups, forward, backward)


def _ring(frame: Frame, bill: Bill, attention: AttentionShape, groups: int, forward: float, backward: float) -> None:
    """Keys and values to the other context-parallel ranks."""
    others = frame.work.division.cp - 1
    if others:
        width = groups * (attention.head_dim + attention.value_dim)
        once = others * frame.context.send(frame.tokens * width * frame.kernels.element)
        bill.add("cp", exposed(once, forward), exposed(2 * once, backward))
