"""A model on GPUs: its division, what memory remains, and, when it does not fit, what would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Gpu, Precision
from skymoe.plan.serve.divide import choose
from skymoe.plan.serve.engine import Engine
from skymoe.plan.serve.frontier import KV_BLOCK, Fitted, frontier
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish
from skymoe.plan.serve.shares import kv_token_bytes, weight_bytes

_GB = 1e9
_MORE = 64


def reserves(
    served: Served, gpus: Sequence[Gpu], engine: Engine, *, max_batch: int, given: float | None
) -> tuple[float, ...]:
    """Bytes per GPU beside weights, keys and values: context and libraries, activations of a step, logits."""
    if given is not None:
        return (given * _GB,) * len(gpus)
    shape = served.shape
    widest = max(
        (layer.ffn.inner * max(1, layer.ffn.top_k) + layer.ffn.shared_inner for layer in shape.layers), default=0
    )
    tokens = engine.chunk + max_batch
    hidden = tokens * 2.0 * (6 * shape.hidden_size + 2 * widest / len(gpus))
    logits = max_batch * 4.0 * shape.vocab_size
    return tuple(engine.reserved(gpu.memory) + hidden + logits for gpu in gpus)


def fit(served: Served, gpus: Sequence[Gpu], reserve: Sequence[float], wish: Wish) -> Fitted | None:
    """The fastest division in which `wish.kv_tokens` have room, and of those the one with most; None if none fits."""
    return next(frontier(served, gpus, reserve, wish), None)


def refuse(
    served: Served, gpus: Sequence[Gpu], engine: Engine, wish: Wish, *, max_batch: int, reserve: float | None
) -> ConfigError:
    """Why nothing fits, by how much on each GPU, and the smallest changes that would do."""

    def fits(
        *, model: Served = served, on: Sequence[Gpu] = gpus, asked: Wish = wish, kept_gb: float | None = reserve
    ) -> bool:
        kept = reserves(model, on, engine, max_batch=max_batch, given=kept_gb)
        rooms = [gpu.memory - part for gpu, part in zip(on, kept, strict=True)]
        asked = asked if len(on) == len(gpus) else replace(asked, fixed={})
        return min(rooms) > 0 and choose(model, on, rooms, asked) is not None

    kept = reserves(served, gpus, engine, max_batch=max_batch, given=reserve)
    tokens = served.kv_token_bytes * wish.kv_tokens
    have = sum(gpu.memory - part for gpu, part in zip(gpus, kept, strict=True))
    need = served.total_bytes + tokens
    lacking = max(0.0, need - have) / _GB
    what = f"{served.shape.name} does not fit on {counted(gpus)}: "
    smallest, most = min(((gpu.memory - part) / _GB, part / _GB) for gpu, part in zip(gpus, kept, strict=True))
    if smallest <= 0:
        what += f"{most:.2f} GB of a GPU are reserved, and it has {smallest + most:.2f}"
    else:
        what += f"{lacking:.2f} GB are lacking in all" if lacking else "no division of whole units fits"
    why = (
        f"weights {served.total_bytes / _GB:.1f} GB and {wish.kv_tokens} tokens of keys and values "
        f"{tokens / _GB:.1f} GB; {len(gpus)} GPUs have {max(0.0, have) / _GB:.1f} GB beside what is reserved"
    )
    each = _each(served, gpus, kept, wish)
    return ConfigError(
        what,
        why=why + (f"; the fastest division lacks {each}" if each else ""),
        hint="; or ".join(_ways(served, gpus, wish, fits, reserve)) or "a smaller model",
    )


def _each(served: Served, gpus: Sequence[Gpu], kept: Sequence[float], wish: Wish) -> str:
    """GB that the GPUs of each kind lack, or have to spare, in the fastest division as if memory were no matter."""
    shares = choose(served, gpus, [1e18] * len(gpus), wish)
    if shares is None:
        return ""
    over: dict[str, list[float]] = {}
    for g, gpu in enumerate(gpus):
        used = weight_bytes(served, shares, g) + kv_token_bytes(served, shares, g) * wish.kv_tokens + kept[g]
        over.setdefault(gpu.name, []).append((used - gpu.memory) / _GB)
    told = []
    for name, values in over.items():
        low, high = f"{min(map(abs, values)):.2f}", f"{max(map(abs, values)):.2f}"
        if min(values) > 0 or max(values) <= 0:
            amount = low if low == high else f"{low} to {high}"
            told.append(f"{amount} GB on each {name}" if min(values) > 0 else f"none on {name} ({amount} to spare)")
        else:
            told.append(f"up to {max(values):.2f} GB on {name}")
    return ", ".join(told)


class _Fits(Protocol):
    def __call__(
        self, *, model: Served = ..., on: Sequence[Gpu] = ..., asked: Wish = ..., kept_gb: float | None = ...
    ) -> bool: ...


def _ways(served: Served, gpus: Sequence[Gpu], wish: Wish, fits: _Fits, reserve: float | None) -> list[str]:
    """Single changes that make it fit."""
    ways = []
    if reserve is not None and fits(kept_gb=0.0):
        less, more_gb = 0, int(reserve * 10)  # in tenths of a GB
        while more_gb - less > 1:
            tenths = (less + more_gb) // 2
            less, more_gb = (tenths, more_gb) if fits(kept_gb=tenths / 10) else (less, tenths)
        ways.append(f"--reserve {less / 10:g}")
    if wish.fixed and fits(asked=replace(wish, fixed={})):
        ways.append("no --split: the planner's division fits")
    if fits(asked=replace(wish, kv_tokens=KV_BLOCK)):
        low, high = KV_BLOCK, wish.kv_tokens
        while high - low > KV_BLOCK:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(asked=replace(wish, kv_tokens=middle)) else (low, middle)
        ways.append(f"--context {low}")
    for name, size, compute in (("fp8", 1.0, Precision.FP8), ("int4", 0.5625, Precision.INT4)):
        if served.weight_bytes > size and fits(model=replace(served, weight_bytes=size, compute=compute)):
            ways.append(f"--weights {name}")
            break
    if served.kv_bytes > 1 and fits(model=replace(served, kv_bytes=1.0)):
        ways.append("--kv fp8")
    more = next((n for n in range(1, _MORE) if fits(on=(*gpus, *[gpus[-1]] * n))), None)
    if more is not None:
        ways.append(f"--gpus {counted((*gpus, *[gpus[-1]] * more))}")
    return ways


def counted(gpus: Sequence[Gpu]) -> str:
    """As on the command line: 4xrtx4090,2xrtx3090."""
    parts: list[list[object]] = []
    for gpu in gpus:
        if parts and parts[-1][1] == gpu.name:
            parts[-1][0] = int(str(parts[-1][0])) + 1
        else:
            parts.append([1, gpu.name])
    return ",".join(f"{number}x{name}" for number, name in parts)
