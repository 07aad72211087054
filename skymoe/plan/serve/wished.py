"""Divisions that are not by threshold alone: what the user gave, and key/value heads fewer than GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish, checked, ends, filled, heads_of_unit, nearest, units_of
from skymoe.plan.serve.shares import Shares
from skymoe.plan.serve.threshold import Bin, Units, minimax
from skymoe.spec.split import Split


def _wished(wish: Wish, name: str, total: int, block: int) -> tuple[int, ...] | None:
    """Units that the user gave, in blocks; sums may be in units or in what a unit consists of."""
    if name in wish.fixed:
        sizes = wish.fixed[name]
        if sum(sizes) == total * block and block > 1:
            if any(size % block for size in sizes):
                raise ConfigError(
                    f"--split {name}: sizes must be multiples of {block}", why="a unit is never cut",
                    hint=f"--split {name}={','.join(str(size * block) for size in nearest(sizes, total))}",
                )  # fmt: skip
            return tuple(int(size) // block for size in sizes)
        return checked(sizes, total, name)
    return Split.weighted(total, wish.fixed["weights"]).sizes if "weights" in wish.fixed else None


def as_wished(served: Served, base: Shares, units: Units, bins: Sequence[Bin], wish: Wish) -> Shares | None:
    """What the user gave, and the rest by threshold in the memory that is left."""
    groups = _wished(wish, "heads", units.attention, heads_of_unit(served))
    ffn = _wished(wish, "experts" if base.whole else "ffn", units.ffn, 1 if base.whole else base.block)
    if groups is None:
        most = [
            int((b.room - f * units.ffn_bytes) // units.attention_bytes) for b, f in zip(bins, ffn or (), strict=True)
        ]
        groups = minimax(units.attention, [b.attention_s for b in bins], most) if min(most) >= 0 else None
    elif ffn is None:
        most = [int((b.room - a * units.attention_bytes) // units.ffn_bytes) for b, a in zip(bins, groups, strict=True)]
        ffn = minimax(units.ffn, [b.ffn_s for b in bins], most) if min(most) >= 0 else None
    if groups is None or ffn is None:
        return None
    if any(units.used(a, f, 1) > b.room for a, f, b in zip(groups, ffn, bins, strict=True)):
        return None
    return filled(served, base, units, [[g] for g in range(base.num_gpus)], groups, ffn)


def replicated(served: Served, gpus: Sequence[Gpu], rooms: Sequence[float], wish: Wish) -> Shares | None:
    """More GPUs than key/value heads: a team of consecutive GPUs per head. Then the feed-forward in what is left."""
    if "heads" in wish.fixed:
        raise ConfigError(
            f"--split heads: {len(gpus)} GPUs for {served.attention.num_kv_heads} key/value heads",
            why="key/value heads are replicated, and their query heads divided within each team",
            hint="leave the heads to the planner",
        )
    base, fixed_bytes = ends(served, gpus, wish)
    a, layers = served.attention, served.shape.num_layers
    teams = Split.remainder_first(len(gpus), a.num_kv_heads)
    speed = [gpu.bandwidth * gpu.laws.memory for gpu in gpus]
    heads = [0] * len(gpus)
    for team in teams:
        sizes = minimax(heads_of_unit(served), [1.0 / speed[g] for g in team])
        assert sizes is not None
        for g, size in zip(team, sizes, strict=True):
            heads[g] = size
    kv = [1 if size else 0 for size in heads]
    units = units_of(served, base, wish)
    per_token = layers * served.kv_head_bytes
    used = [
        layers * (h * served.query_elements + k * served.kv_elements) * served.weight_bytes
        + k * per_token * wish.kv_tokens
        for h, k in zip(heads, kv, strict=True)
    ]
    left = [room - f - u for room, f, u in zip(rooms, fixed_bytes, used, strict=True)]
    if min(left) < 0:
        return None
    ffn = _wished(wish, "experts" if base.whole else "ffn", units.ffn, 1 if base.whole else base.block)
    if ffn is None:
        ffn = minimax(units.ffn, [1.0 / s for s in speed], [int(room / units.ffn_bytes) for room in left])
    if ffn is None or any(size * units.ffn_bytes > room for size, room in zip(ffn, left, strict=True)):
        return None
    base = filled(served, base, units, [[g] for g in range(len(gpus))], (0,) * len(gpus), ffn)
    return replace(
        base, heads=tuple(heads), kv_heads=tuple(kv), mean_heads=tuple(map(float, heads)),
        mean_kv_heads=tuple(map(float, kv)), rotated=False,
        replicas=max(sum(1 for g in team if heads[g]) for team in teams),
    )  # fmt: skip
