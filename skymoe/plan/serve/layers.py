"""The other way to serve: layers over GPUs, one after another (pipeline), instead of a part of each layer on each.

Contiguous layers, in order; the embedding belongs to the first GPU, the head to the last. The slowest stage sets the
rate, the stage with the least room sets how many tokens have keys and values: exact by threshold. For a time T the GPUs
are filled in order, each as far as T and its memory allow; T is bisected, and then the tokens that have room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.frontier import KV_BLOCK
from skymoe.plan.serve.model import Served
from skymoe.plan.shape import LayerShape, layer_parameters


@dataclass(frozen=True)
class Stages:
    """Layers per GPU, and the tokens that have room."""

    layers: tuple[int, ...]
    kv_tokens: int


@dataclass(frozen=True)
class _Costs:
    """Bytes of each layer, of a token in it, and of the ends; seconds are bytes over bandwidth."""

    layers: tuple[float, ...]
    token: float
    first: float
    last: float


def balanced(
    served: Served, gpus: Sequence[Gpu], reserve: Sequence[float], *, kv_tokens: int, load_tokens: int
) -> Stages | None:
    """Layers over GPUs: the slowest stage as fast as can be, then as many tokens as possible; None if none fits."""
    costs = _costs(served)
    rooms = [gpu.memory - kept for gpu, kept in zip(gpus, reserve, strict=True)]
    if len(gpus) > served.shape.num_layers or _packed(costs, gpus, rooms, float("inf"), kv_tokens, load_tokens) is None:
        return None
    total = sum(costs.layers) + costs.last + load_tokens * costs.token * len(costs.layers)
    low, high = 0.0, total / min(gpu.bandwidth * gpu.laws.memory for gpu in gpus)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _packed(costs, gpus, rooms, middle, kv_tokens, load_tokens) else (middle, high)
    high *= 1 + 1e-9
    few, many = kv_tokens, kv_tokens + int(sum(rooms) / (costs.token * len(costs.layers))) + KV_BLOCK
    while many - few > KV_BLOCK:
        tokens = (few + many) // 2
        fits = _packed(costs, gpus, rooms, high, tokens, load_tokens) is not None
        few, many = (tokens, many) if fits else (few, tokens)
    return Stages(_evened(costs, gpus, rooms, high, few, load_tokens), few // KV_BLOCK * KV_BLOCK)


def _evened(
    costs: _Costs, gpus: Sequence[Gpu], rooms: Sequence[float], seconds: float, kv_tokens: float, load_tokens: float
) -> tuple[int, ...]:
    """Within time and memory, each GPU only its fair part of the layers left, if the others can take the rest."""
    done: list[int] = []
    for left in range(len(gpus), 0, -1):
        at = sum(done)
        fair = -(-(len(costs.layers) - at) // left)
        most = _packed(costs, gpus, rooms, seconds, kv_tokens, load_tokens, done=done)
        assert most is not None
        for count in range(min(fair, most[len(done)]), most[len(done)] + 1):
            if _packed(costs, gpus, rooms, seconds, kv_tokens, load_tokens, done=[*done, count]) is not None:
                break
        done.append(count)
    return tuple(done)


def _costs(served: Served) -> _Costs:
    shape = served.shape
    sizes = {layer: layer_parameters(layer, shape.hidden_size) * served.weight_bytes for layer in set(shape.layers)}
    end = shape.hidden_size * shape.vocab_size * served.head_bytes
    token = served.kv_token_bytes / shape.num_layers
    return _Costs(tuple(sizes[layer] for layer in shape.layers), token, end, end)


def _packed(
    costs: _Costs, gpus: Sequence[Gpu], rooms: Sequence[float], seconds: float, kv_tokens: float, load_tokens: float,
    done: Sequence[int] = (),
) -> tuple[int, ...] | None:  # fmt: skip
    """Layers per GPU when each, after those of `done`, takes as many as it can in order; None when some are left."""
    layers, at, num = list(done), sum(done), len(costs.layers)
    for g in range(len(done), len(gpus)):
        speed = gpus[g].bandwidth * gpus[g].laws.memory
        last = g == len(gpus) - 1
        held = (costs.first if g == 0 else 0.0) + (costs.last if last else 0.0)
        read = costs.last if last else 0.0
        start, most = at, num - (len(gpus) - 1 - g)  # a layer for each that follows
        while at < most:
            held += costs.layers[at] + kv_tokens * costs.token
            read += costs.layers[at] + load_tokens * costs.token
            if held > rooms[g] or read > seconds * speed:
                break
            at += 1
        layers.append(at - start)
    return tuple(layers) if at == num and min(layers) > 0 else None


def stage_layers(served: Served, layers: Sequence[int]) -> tuple[tuple[tuple[LayerShape, float], ...], ...]:
    """For each stage: its kinds of layers, and how many."""
    found, at = [], 0
    for count in layers:
        part = served.shape.layers[at : at + count]
        found.append(tuple((kind, float(part.count(kind))) for kind in dict.fromkeys(part)))
        at += count
    return tuple(found)
