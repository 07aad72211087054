"""Prices of the ends of the model: embedding, head with loss, and of the hop between stages.

The head costs more than its FLOPs, and less backward than twice its forward (measured per stage: 1.16 to 1.38 times
its share, forward to backward 0.46 : 0.54). The reason is the loss: logits are turned to 32 bits and pass through
memory some ten times forward (convert, maximum, subtract, exponentiate, sum, divide: 38 bytes per logit in
Megatron-LM's vocabulary-parallel cross entropy) and a few times backward (scale, convert: 14 bytes).
Fused, 12 and 8 are taken (logits read in 16 bits twice, probabilities written once: a count, not a measurement).

The embedding's look-up is nothing, but its gradient is a dense matrix that is cleared, read and added to the gradient
buffer in every micro-batch: (4 + 2 * gradient bytes) per parameter, whatever the number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

from skymoe.plan.cost.bill import Bill, Frame
from skymoe.plan.cost.collectives import Group, exposed
from skymoe.plan.cost.laws import Kernels
from skymoe.plan.hardware.gpu import Precision

HEAD_RATE = 1.15
"""The head's product is the widest of a model and runs nearer to the peak than those of a layer do on average: forward
and backward with 256,000 columns took 26.0 and 30.5 ms, the loss included (a stage of Vocabulary Parallelism's artifact
that has nothing else)."""
LOSS_BYTES = (38.0, 14.0)  # forward, backward, per logit


def embedding_bill(frame: Frame) -> Bill:
    """The embedding."""
    bill, kernels = Bill(), frame.kernels
    division = frame.work.division
    one = frame.tokens * frame.hidden * kernels.element
    table = math.ceil(frame.work.shape.vocab_size / division.tp) * frame.hidden
    dense = table * (2 * kernels.element + 2 * division.gradient_bytes)
    passes = 2 + (2 if frame.work.shape.positions else 0) + (2 if frame.work.shape.dropout else 0)
    bill.add("memory", kernels.memory(passes * one), kernels.memory(passes * one + dense, 2))
    if division.tp > 1 and division.sequence_parallel:
        once = frame.tensor.all_gather(frame.stream_bytes)
        bill.add("tp", once, once)
    elif division.tp > 1:
        bill.add("tp", frame.tensor.all_reduce(frame.stream_bytes), 0.0)
    return bill


def head_bill(frame: Frame) -> Bill:
    """The last norm, the head, the loss."""
    bill = Bill()
    work, gpu = frame.work, frame.work.cluster.gpu
    wide = Precision.FP32 if work.precision is Precision.FP32 else Precision.BF16
    kernels = Kernels.of(gpu, wide, gradient=work.division.gradient_bytes)
    kernels = replace(kernels, rate=HEAD_RATE * kernels.rate)
    columns = math.ceil(work.shape.vocab_size / work.division.tp)
    product = kernels.linear(frame.tokens, frame.hidden, columns)
    bill.linear(product)
    one = frame.rows * frame.hidden * kernels.element
    bill.add("memory", kernels.memory(2 * one), kernels.memory(3 * one))
    logits = frame.tokens * columns
    forward, backward = LOSS_BYTES
    bill.add("memory", kernels.memory(forward * logits, 8), kernels.memory(backward * logits, 4))
    if work.division.tp > 1:
        small = 3 * frame.tensor.all_reduce(4.0 * frame.tokens)
        gather = frame.tensor.all_gather(frame.stream_bytes)
        if work.division.sequence_parallel:
            bill.add("tp", small + gather, exposed(gather, product.inputs) + exposed(gather, product.weights))
        else:
            reduce = frame.tensor.all_reduce(frame.stream_bytes)
            bill.add("tp", small, exposed(reduce, product.weights))
    return bill


def hop_s(frame: Frame) -> float:
    """From stage to stage, one way: the residual stream of a rank's tokens."""
    division = frame.work.division
    if division.pp == 1:
        return 0.0
    pair = Group(frame.work.cluster, 2, division.stage_ranks)
    return pair.send(frame.rows * frame.hidden * frame.kernels.element)
