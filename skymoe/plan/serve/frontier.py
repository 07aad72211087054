"""All divisions that are worth a look: no other has both a faster layer and more room for keys and values.

`choose` gives the fastest division in which a number of tokens has room, exactly. Asked for more tokens the fastest
layer can only become slower, in steps: of each step the last page of tokens is found by galloping and bisection, then a
page more is asked for. So the list is complete, from the fastest division to the one with the most room, and what a
step of the whole engine takes need not be known. Equal GPUs that share a remainder, or a division that is given, have
one point: there is nothing to trade.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.divide import choose
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish
from skymoe.plan.serve.shares import Shares, kv_token_bytes, weight_bytes

KV_BLOCK = 16
"""Tokens of a page of keys and values."""
_SAME = 1 + 1e-9


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A division with its memory.

    Attributes:
        shares: the division.
        weights, reserve: bytes per GPU.
        token: bytes of keys and values of one token per GPU.
        kv_tokens: tokens that have room, whole pages; the least of all GPUs.
    """

    shares: Shares
    weights: tuple[float, ...]
    reserve: tuple[float, ...]
    token: tuple[float, ...]
    kv_tokens: int


def frontier(served: Served, gpus: Sequence[Gpu], reserve: Sequence[float], wish: Wish) -> Iterator[Fitted]:
    """From the fastest division in which `wish.kv_tokens` have room to the one with the most room; none: none fits."""
    found, tokens = _fastest(served, gpus, reserve, wish), wish.kv_tokens
    while found is not None:
        if wish.fixed or (wish.rotate and len(set(gpus)) == 1):
            yield found
            return
        found = _roomiest(served, gpus, reserve, wish, found)
        yield found
        tokens = max(tokens, found.kv_tokens) + KV_BLOCK
        found = _fastest(served, gpus, reserve, replace(wish, kv_tokens=tokens))


def _roomiest(served: Served, gpus: Sequence[Gpu], reserve: Sequence[float], wish: Wish, found: Fitted) -> Fitted:
    """The most room with a layer as fast as that of `found`."""
    limit = layer_s(served, gpus, found.shares, wish) * _SAME

    def as_fast(pages: int) -> Fitted | None:
        more = _fastest(served, gpus, reserve, replace(wish, kv_tokens=pages * KV_BLOCK))
        return more if more is not None and layer_s(served, gpus, more.shares, wish) <= limit else None

    low, step, high = found.kv_tokens // KV_BLOCK, 1, 0
    while not high or high - low > 1:
        pages = (low + high) // 2 if high else low + step
        more = as_fast(pages)
        if more is None:
            high = pages
        else:
            found, low, step = more, max(pages, more.kv_tokens // KV_BLOCK), 2 * step
    return found


def layer_s(served: Served, gpus: Sequence[Gpu], shares: Shares, wish: Wish) -> float:
    """Bytes over bandwidth of a layer's two halves, each on its slowest GPU: what `choose` makes least."""
    attention, ffn = 0.0, 0.0
    for g, gpu in enumerate(gpus):
        speed = gpu.bandwidth * gpu.laws.memory
        head = shares.heads[g] * served.query_elements + shares.kv_heads[g] * served.kv_elements
        load = head * served.weight_bytes + wish.load_tokens * shares.kv_heads[g] * served.kv_head_bytes
        main = served.expert_ffn or served.dense_ffn
        assert main is not None
        part = main.matrices * served.shape.hidden_size * served.weight_bytes * shares.columns[g] * shares.experts[g]
        attention, ffn = max(attention, load / speed), max(ffn, part / speed)
    return attention + ffn


def _fastest(served: Served, gpus: Sequence[Gpu], reserve: Sequence[float], wish: Wish) -> Fitted | None:
    rooms = [gpu.memory - kept for gpu, kept in zip(gpus, reserve, strict=True)]
    shares = choose(served, gpus, rooms, wish) if min(rooms) > 0 else None
    return None if shares is None else measured(served, gpus, shares, reserve)


def measured(served: Served, gpus: Sequence[Gpu], shares: Shares, reserve: Sequence[float]) -> Fitted:
    """`shares` with their memory."""
    weights = tuple(weight_bytes(served, shares, g) for g in range(len(gpus)))
    token = tuple(kv_token_bytes(served, shares, g) for g in range(len(gpus)))
    tokens = min(
        (gpu.memory - kept - used) / each if each else float(1 << 40)
        for gpu, kept, used, each in zip(gpus, reserve, weights, token, strict=True)
    )
    return Fitted(
        shares=shares, weights=weights, reserve=tuple(reserve), token=token,
        kv_tokens=max(0, int(tokens * (1 + 1e-12)) // KV_BLOCK * KV_BLOCK),
    )  # fmt: skip
