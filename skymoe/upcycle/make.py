"""The operations of `operations.py`, performed: tensors in, tensors out. D hidden size, E experts, F width, K neurons.

Random values and the statistics they follow come from `ops.reproducible`: the same bits on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.errors import FormatError
from skymoe.convert.apply import Make, Read, make_common
from skymoe.convert.plan import Operation, Source
from skymoe.ops.reproducible import choice, mean_and_std, normal, permutation, uniform
from skymoe.upcycle.operations import AddNoise, Average, Centroids, CloneRows, Random, Redraw, Shards


def maker(centroids: Mapping[int, Tensor], directories: Sequence[Path]) -> Make:
    """The function that makes the results of every operation of this job.

    It raises FormatError where a tensor that is reckoned with holds NaN or infinity: one NaN would make the mean NaN,
    and with it every neuron drawn anew. What is only copied or cut is left to the receipt.

    Args:
        centroids: of each layer, (clusters, D) of unit length; empty when no router is made of them.
        directories: of the parents, for the message.
    """

    def make(operation: Operation, read: Read) -> tuple[Tensor, ...]:
        def finite(source: Source) -> Tensor:
            weight = read(source)
            if not is_finite(weight):
                raise FormatError(f"tensor {source.name} holds NaN or infinity", where=directories[source.parent])
            return weight

        match operation:
            case Random():
                return (random_rows(operation),)
            case Centroids():
                return (repeated(centroids[operation.layer] * operation.length, operation.repeat),)
            case Redraw():
                return (redraw(operation, finite(operation.source)),)
            case AddNoise():
                return (add_noise(operation, finite(operation.source)),)
            case Shards():
                return shards(operation, read(operation.source))
            case Average():
                return (average(operation, finite),)
            case CloneRows():
                return (clone_rows(operation, finite(operation.source)),)
        return make_common(operation, read)

    return make


def is_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass without a copy, as a NaN anywhere is both extremes."""
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(weight))


def random_rows(operation: Random) -> Tensor:
    """(rows x repeat, width) in fp32."""
    shape = (operation.rows, operation.width)
    if operation.flat:
        return repeated(uniform(shape, 3**0.5 * operation.std, operation.key), operation.repeat)
    return repeated(normal(shape, operation.std, operation.key), operation.repeat)


def repeated(rows_ED: Tensor, times: int) -> Tensor:
    """Each row `times` times, one after another: expert e G + g has the row of group e."""
    return rows_ED.repeat_interleave(times, 0)


def redraw(operation: Redraw, weight: Tensor) -> Tensor:
    """`weight` with the chosen neurons drawn from N(mean, deviation) of their old values. Changes `weight`."""
    neurons_K = choice(weight.shape[operation.axis], operation.count, operation.indices_key)
    old = weight.index_select(operation.axis, neurons_K)
    mean, std = mean_and_std(old)
    new = normal(tuple(old.shape), std, operation.values_key, mean=mean)
    return weight.index_copy_(operation.axis, neurons_K, new.to(weight.dtype))


def add_noise(operation: AddNoise, weight: Tensor) -> Tensor:
    """`weight` with noise on the chosen neurons, rounded once. Changes `weight`."""
    neurons_K = choice(weight.shape[operation.axis], operation.count, operation.indices_key)
    _, std = mean_and_std(weight)
    old = weight.index_select(operation.axis, neurons_K)
    new = normal(tuple(old.shape), operation.std * std, operation.values_key).add_(old)
    return weight.index_copy_(operation.axis, neurons_K, new.to(weight.dtype))


def shards(operation: Shards, weight: Tensor) -> tuple[Tensor, ...]:
    """`count` equal parts of the neurons, scaled in fp32 and rounded once."""
    axis = operation.axis
    if operation.shuffle_key:
        weight = weight.index_select(axis, permutation(weight.shape[axis], operation.shuffle_key))
    return tuple(_scaled(part, operation.scale) for part in weight.chunk(operation.count, axis))


def average(operation: Average, read: Read) -> Tensor:
    """The mean, added up in the order of the sources; fp32."""
    first, *others = operation.of
    total = read(first).float()
    for source in others:
        total += read(source).float()
    return total.div_(len(operation.of))


def clone_rows(operation: CloneRows, rows: Tensor) -> Tensor:
    """The rows once around up to `count`, in fp32; those after the first round carry noise."""
    num_rows = rows.shape[0]
    cloned = rows.float()[torch.arange(operation.count) % num_rows] * operation.scale
    if operation.noise:
        _, std = mean_and_std(rows)
        cloned[num_rows:] += normal(tuple(cloned[num_rows:].shape), operation.noise * std, operation.key)
    return cloned


def _scaled(weight: Tensor, scale: float) -> Tensor:
    """Contiguous, so that the shards do not keep one another's memory alive."""
    return weight.contiguous() if scale == 1.0 else (weight.float() * scale).to(weight.dtype)
