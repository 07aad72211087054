"""Price of the feed-forward half of a layer: dense, or a mixture of experts with its dispatch.

Experts. The slowest rank has ceil(E / ep) of them and 1 / etp of each; its group of ep * etp ranks brings
ep * etp * t/tp tokens, k choices each, so with equal loads a rank computes etp * k * t/tp rows times the share
ceil(E / ep) / (E / ep), in one grouped product per matrix. Imbalance multiplies the rows (all wait for the slowest
rank: entered as "wait"); a capacity factor multiplies what is computed and sent, padded rows included.

Dispatch, the bytes of `spec/traffic.py` (a test holds them together), on the links that the group spans:

    R   all-reduce over tp; where experts span replicas, all-gather and reduce-scatter of whole replicas as well
    G   all-gather and reduce-scatter over the group
    A   all-to-all there and back over ep; all-gather and reduce-scatter of the routed rows over etp

Streams: permuting rows there and back, 3 passes of k rows each way; the activation, 3 passes of the inner width
forward and 5 backward with a gate, 2 and 3 without. The router is a product of 32-bit numbers and some ten small
kernels. Left out: tokens dropped, a capacity that is not reached.
"""

from __future__ import annotations

import math

from skymoe.plan.cost.attention import residual_streams
from skymoe.plan.cost.bill import Bill, Frame, tensor_parallel
from skymoe.plan.cost.collectives import Group, exposed
from skymoe.plan.cost.laws import NOTHING, LinearTime
from skymoe.plan.memory.static import columns as columns_of
from skymoe.plan.shape import FfnShape
from skymoe.plan.work import Recompute
from skymoe.spec.layout import DispatchMode

HOST_MOE = 8.0  # times the host time of a dense half: kernels to start, and counts that the host waits for
_ROUTER_KERNELS = 10


def ffn_bill(frame: Frame, ffn: FfnShape) -> Bill:
    """The feed-forward half."""
    bill, host_s = Bill(), frame.work.cluster.gpu.laws.host_s
    residual_streams(frame, bill)
    if not ffn.is_moe:
        tensor_parallel(frame, bill, _dense(frame, bill, ffn, ffn.inner))
        bill.at_least(host_s)
        return bill
    if ffn.shared_inner:
        tensor_parallel(frame, bill, _dense(frame, bill, ffn, ffn.shared_inner))
    _router(frame, bill, ffn)
    _experts(frame, bill, ffn)
    _dispatch(frame, bill, ffn)
    bill.at_least(HOST_MOE * host_s)
    return bill


def expert_rows(frame: Frame, ffn: FfnShape) -> float:
    """Rows that the slowest rank's experts compute with equal loads, times the capacity factor."""
    division = frame.work.division
    mean = ffn.top_k * division.etp * frame.tokens / division.tp * (frame.work.capacity or 1.0)
    return mean * local_experts(frame, ffn) * division.ep / ffn.num_experts


def local_experts(frame: Frame, ffn: FfnShape) -> int:
    """Experts of the fullest rank."""
    return math.ceil(ffn.num_experts / frame.work.division.ep)


def _dense(frame: Frame, bill: Bill, ffn: FfnShape, inner: int) -> LinearTime:
    """Matrices and activation of a feed-forward that all tokens pass; returns the first matrix."""
    columns = columns_of(inner, frame.work.division.tp)
    first = frame.kernels.linear(frame.tokens, frame.hidden, columns * (ffn.matrices - 1))
    bill.linear(first)
    bill.linear(frame.kernels.linear(frame.tokens, columns, frame.hidden))
    _activation(frame, bill, ffn, frame.tokens * columns)
    return first


def _activation(frame: Frame, bill: Bill, ffn: FfnShape, numbers: float) -> None:
    forward, backward = (3, 5) if ffn.gated else (2, 3)
    kernels, again = frame.kernels, frame.work.recompute is Recompute.MOE_ACT
    one = numbers * kernels.element
    bill.add("memory", kernels.memory(forward * one), kernels.memory(backward * one), again=again)


def _router(frame: Frame, bill: Bill, ffn: FfnShape) -> None:
    kernels = frame.kernels
    read = frame.rows * frame.hidden * 4.0
    wait = _ROUTER_KERNELS * kernels.launch_s
    numbers = frame.rows * ffn.num_experts * 4.0
    bill.add("gemm", kernels.memory(read), 2 * kernels.memory(read))
    bill.add("memory", wait + kernels.memory(6 * numbers), wait + kernels.memory(6 * numbers))


def _experts(frame: Frame, bill: Bill, ffn: FfnShape) -> None:
    """Grouped products and the activation between them; imbalance apart."""
    kernels, work = frame.kernels, frame.work
    experts, inner = local_experts(frame, ffn), columns_of(ffn.inner, work.division.etp)
    imbalance = 1.0 if work.capacity else max(1.0, work.imbalance)

    def products(rows: float) -> LinearTime:
        if rows <= 0:
            return NOTHING
        each = rows / experts
        first = kernels.linear(each, frame.hidden, inner * (ffn.matrices - 1), times=experts)
        return first + kernels.linear(each, inner, frame.hidden, times=experts)

    rows = expert_rows(frame, ffn)
    even, full = products(rows), products(rows * imbalance)
    bill.linear(even)
    bill.add("wait", full.forward - even.forward, full.backward - even.backward)
    bill.weight_s += full.weights - even.weights
    _activation(frame, bill, ffn, rows * imbalance * inner)
    moved = 3 * ffn.top_k * frame.tokens / work.division.tp * frame.hidden * kernels.element
    bill.add("memory", 2 * kernels.memory(moved, 2), 2 * kernels.memory(moved, 2))


def _dispatch(frame: Frame, bill: Bill, ffn: FfnShape) -> None:
    forward = backward = dispatch_s(frame, ffn)
    if frame.work.division.expert_overlap:
        forward = exposed(forward, sum(bill.forward.values()))
        backward = exposed(backward, sum(bill.backward.values()))
    bill.add("expert", forward, backward)


def dispatch_s(frame: Frame, ffn: FfnShape) -> float:
    """Seconds of dispatch and combine in one pass."""
    division, cluster = frame.work.division, frame.work.cluster
    group_size = division.ep * division.etp
    if group_size == 1 and not (division.tp > 1 and division.dispatch is DispatchMode.REPLICATED):
        return 0.0
    own = frame.stream_bytes / division.tp  # of this rank's part of the tokens
    if division.dispatch is DispatchMode.REPLICATED:
        replicas = max(1, group_size // division.tp)
        whole = Group(cluster, replicas, division.tp)
        return 2.0 * whole.all_gather(replicas * frame.stream_bytes) + frame.tensor.all_reduce(frame.stream_bytes)
    if division.dispatch is DispatchMode.GATHERED:
        return 2.0 * Group(cluster, group_size).all_gather(group_size * own)
    routed = own * ffn.top_k * (frame.work.capacity or 1.0)
    copies = ffn.top_k if division.node_dispatch else 1
    there = Group(cluster, division.ep, division.expert_stride).all_to_all(routed, copies=copies)
    cut = Group(cluster, division.etp, 1)
    return 2.0 * there + 2.0 * cut.all_gather(division.etp * routed)
