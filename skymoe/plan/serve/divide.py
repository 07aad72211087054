"""Which GPU gets which units: the fastest division that fits, equal GPUs or not (`threshold.py` has the proof).

The time of a unit is its bytes over the GPU's memory bandwidth, weights and the keys and values of `load_tokens`
together: decoding reads all of it every step. Vocabulary, shared experts and the dense layers of a mixture are divided
first, by bandwidth alone; heads and feed-forward share what memory is left. Where there are more GPUs than key/value
heads, the heads are replicated: consecutive GPUs form a team per key/value head and divide its query heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.shares import Shares, weight_bytes
from skymoe.plan.serve.threshold import Bin, Units, divide, minimax
from skymoe.spec.split import Split

FP8_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How to divide.

    Attributes:
        kv_tokens: tokens whose keys and values must fit.
        load_tokens: tokens that are read in a step, for the balance between heads and feed-forward.
        rotate: the remainder goes round by layer.
        whole: experts are not cut.
        fixed: units that the user has divided: "heads", "ffn", "experts", "vocabulary"; "weights" for all of them.
    """

    kv_tokens: int
    load_tokens: int
    rotate: bool = True
    whole: bool = False
    fixed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def column_block(inner: int, num_gpus: int, weight_bytes: float) -> int:
    """Columns that stay together: the largest power of two that divides `inner` and leaves every GPU a block.

    At most 128, the blocks of FP8 scales (one or fewer bytes per weight), else 64, as in training.
    """
    most = FP8_BLOCK if weight_bytes < 2 else 64
    return next(
        b for b in (128, 64, 32, 16, 8, 4, 2, 1) if b <= most and inner % b == 0 and inner // b >= num_gpus or b == 1
    )


def choose(served: Served, gpus: Sequence[Gpu], rooms: Sequence[float], wish: Wish) -> Shares | None:
    """The division of `served` over `gpus` with `rooms` bytes each; None when it does not fit."""
    if not served.attention.kv_rank and len(gpus) > served.attention.num_kv_heads:
        return _replicated(served, gpus, rooms, wish)
    base, fixed_bytes = _ends(served, gpus, wish)
    left = [room - used for room, used in zip(rooms, fixed_bytes, strict=True)]
    if min(left) < 0:
        return None
    members = _bins(gpus, wish)
    units = _units(served, base, wish)
    per_head = units.attention_bytes / units.layers
    speed = [gpu.bandwidth * gpu.laws.memory for gpu in gpus]
    group = served.query_elements * _ratio(served) + served.kv_elements
    seconds = group * served.weight_bytes + wish.load_tokens * served.kv_head_bytes
    ffn = units.ffn_bytes / units.layers
    bins = [
        Bin(
            count=len(m), attention_s=max(seconds, per_head * 1e-9) / speed[m[0]], ffn_s=ffn / speed[m[0]],
            room=min(left[g] for g in m),
        )
        for m in members
    ]  # fmt: skip
    if any(name in wish.fixed for name in ("heads", "ffn", "experts", "weights")):
        return _as_wished(served, base, units, bins, wish)
    found = divide(bins, units)
    if found is None:
        return None
    return _filled(served, base, units, members, found.attention, found.ffn)


def whole_model(served: Served, gpu: Gpu) -> Shares:
    """Everything of each layer on one GPU: a stage of a pipeline."""
    shares = choose(served, (gpu,), (float("1e30"),), Wish(kv_tokens=1, load_tokens=1))
    assert shares is not None
    return shares


def _ratio(served: Served) -> int:
    """Query heads of one unit."""
    a = served.attention
    return 1 if a.kv_rank else a.num_heads // a.num_kv_heads


def _bins(gpus: Sequence[Gpu], wish: Wish) -> list[list[int]]:
    """GPUs that share one remainder."""
    if not wish.rotate or wish.fixed:
        return [[g] for g in range(len(gpus))]
    kinds: dict[Gpu, list[int]] = {}
    for index, gpu in enumerate(gpus):
        kinds.setdefault(gpu, []).append(index)
    return list(kinds.values())


def _by_bandwidth(total: int, block: int, gpus: Sequence[Gpu], wish: Wish, name: str) -> tuple[int, ...]:
    if name in wish.fixed:
        return _checked(wish.fixed[name], total, name)
    if "weights" in wish.fixed:
        return tuple(size * block for size in Split.weighted(total // block, wish.fixed["weights"]).sizes)
    sizes = minimax(total // block, [1.0 / (gpu.bandwidth * gpu.laws.memory) for gpu in gpus])
    assert sizes is not None
    return tuple(size * block for size in sizes)


def _checked(sizes: Sequence[float], total: int, name: str) -> tuple[int, ...]:
    whole = tuple(int(size) for size in sizes)
    if any(size != int(size) for size in sizes) or sum(whole) != total:
        raise ConfigError(
            f"--split {name}: {', '.join(f'{size:g}' for size in sizes)} sum to {sum(sizes):g}, not {total}"
        )
    return whole


def _ends(served: Served, gpus: Sequence[Gpu], wish: Wish) -> tuple[Shares, list[float]]:
    """Shares of everything but heads and feed-forward, and their bytes with what every GPU has."""
    shape, moe, dense = served.shape, served.expert_ffn, served.dense_ffn
    rows_block = next(b for b in (64, 32, 16, 8, 4, 2, 1) if shape.vocab_size % b == 0)
    rows = _by_bandwidth(shape.vocab_size, rows_block, gpus, wish, "vocabulary")

    def columns(inner: int) -> tuple[int, ...]:
        block = column_block(inner, len(gpus), served.weight_bytes) if inner else 1
        return _by_bandwidth(inner, block, gpus, wish, "-") if inner else (0,) * len(gpus)

    main = moe or dense
    assert main is not None
    none, nothing = (0,) * len(gpus), (0.0,) * len(gpus)
    base = Shares(
        heads=none, kv_heads=none, columns=none, experts=none, rows=rows,
        dense_columns=columns(dense.inner) if moe and dense else none,
        shared_columns=columns(moe.shared_inner) if moe else none,
        mean_heads=nothing, mean_kv_heads=nothing, mean_columns=nothing, mean_experts=nothing,
        block=column_block(main.inner, len(gpus), served.weight_bytes), whole=wish.whole and moe is not None,
        rotated=wish.rotate and not wish.fixed, replicas=1,
    )  # fmt: skip
    token_bytes = shape.num_layers * served.common_kv_bytes * wish.kv_tokens
    return base, [weight_bytes(served, base, g) + token_bytes for g in range(len(gpus))]


def _units(served: Served, base: Shares, wish: Wish) -> Units:
    shape, moe, dense = served.shape, served.expert_ffn, served.dense_ffn
    group = served.query_elements * _ratio(served) + served.kv_elements
    a = served.attention
    attention = shape.num_layers * (group * served.weight_bytes + wish.kv_tokens * served.kv_head_bytes)
    main = moe or dense
    assert main is not None
    one = main.matrices * shape.hidden_size * served.weight_bytes * (served.num_moe if moe else shape.num_layers)
    experts = main.num_experts if moe else 1
    ffn, each = (experts, one * main.inner) if base.whole else (main.inner // base.block, one * base.block * experts)
    return Units(
        attention=a.num_heads if a.kv_rank else a.num_kv_heads, ffn=ffn, attention_bytes=attention, ffn_bytes=each,
        layers=shape.num_layers,
    )  # fmt: skip


def _filled(
    served: Served, base: Shares, units: Units, members: Sequence[Sequence[int]], groups: Sequence[int],
    ffn: Sequence[int],
) -> Shares:  # fmt: skip
    """Shares with units per bin spread over its GPUs."""
    num = base.num_gpus
    first = {"groups": [0] * num, "ffn": [0] * num}
    mean = {"groups": [0.0] * num, "ffn": [0.0] * num}
    for name, sizes in (("groups", groups), ("ffn", ffn)):
        for m, size in zip(members, sizes, strict=True):
            parts = Split.remainder_first(size, len(m)).sizes
            for g, part in zip(m, parts, strict=True):
                first[name][g] = part
                mean[name][g] = units.fullest(size, len(m)) / units.layers
    ratio, main = _ratio(served), served.expert_ffn or served.dense_ffn
    assert main is not None
    experts = main.num_experts if main.is_moe else 1
    latent = bool(served.attention.kv_rank)
    if base.whole:
        columns, mean_columns = (main.inner,) * num, (float(main.inner),) * num
        whole, mean_whole = tuple(first["ffn"]), tuple(mean["ffn"])
    else:
        columns = tuple(size * base.block for size in first["ffn"])
        mean_columns = tuple(size * base.block for size in mean["ffn"])
        whole, mean_whole = (experts,) * num, (float(experts),) * num
    return replace(
        base,
        heads=tuple(size * ratio for size in first["groups"]),
        kv_heads=(0,) * num if latent else tuple(first["groups"]),
        columns=columns, experts=whole, mean_heads=tuple(size * ratio for size in mean["groups"]),
        mean_kv_heads=(0.0,) * num if latent else tuple(mean["groups"]),
        mean_columns=mean_columns, mean_experts=mean_whole,
    )  # fmt: skip


def _wished(wish: Wish, name: str, total: int, block: int) -> tuple[int, ...] | None:
    """Units that the user gave, in blocks; sums may be in units or in what a unit consists of."""
    if name in wish.fixed:
        sizes = wish.fixed[name]
        if sum(sizes) == total * block and block > 1:
            if any(size % block for size in sizes):
                raise ConfigError(f"--split {name}: sizes must be multiples of {block}", why="a unit is never cut")
            return tuple(int(size) // block for size in sizes)
        return _checked(sizes, total, name)
    return Split.weighted(total, wish.fixed["weights"]).sizes if "weights" in wish.fixed else None


def _as_wished(served: Served, base: Shares, units: Units, bins: Sequence[Bin], wish: Wish) -> Shares | None:
    """What the user gave, and the rest by threshold in the memory that is left."""
    groups = _wished(wish, "heads", units.attention, _ratio(served))
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
    return _filled(served, base, units, [[g] for g in range(base.num_gpus)], groups, ffn)


def _replicated(served: Served, gpus: Sequence[Gpu], rooms: Sequence[float], wish: Wish) -> Shares | None:
    """More GPUs than key/value heads: a team of consecutive GPUs per head. Then the feed-forward in what is left."""
    if "heads" in wish.fixed:
        raise ConfigError(
            f"--split heads: {len(gpus)} GPUs for {served.attention.num_kv_heads} key/value heads",
            why="key/value heads are replicated, and their query heads divided within each team",
            hint="leave the heads to the planner",
        )
    base, fixed_bytes = _ends(served, gpus, wish)
    a, layers = served.attention, served.shape.num_layers
    teams = Split.remainder_first(len(gpus), a.num_kv_heads)
    speed = [gpu.bandwidth * gpu.laws.memory for gpu in gpus]
    heads = [0] * len(gpus)
    for team in teams:
        sizes = minimax(_ratio(served), [1.0 / speed[g] for g in team])
        assert sizes is not None
        for g, size in zip(team, sizes, strict=True):
            heads[g] = size
    kv = [1 if size else 0 for size in heads]
    units = _units(served, base, wish)
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
    filled = _filled(served, base, units, [[g] for g in range(len(gpus))], (0,) * len(gpus), ffn)
    return replace(
        filled, heads=tuple(heads), kv_heads=tuple(kv), mean_heads=tuple(map(float, heads)),
        mean_kv_heads=tuple(map(float, kv)), rotated=False, replicas=max(teams.sizes),
    )  # fmt: skip
