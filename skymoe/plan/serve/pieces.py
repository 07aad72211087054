"""The pieces of a division: what is asked, units and their bytes, what every GPU has, units spread over bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.shares import Shares, weight_bytes
from skymoe.plan.serve.threshold import Units, minimax
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


def heads_of_unit(served: Served) -> int:
    """Query heads of one unit."""
    a = served.attention
    return 1 if a.kv_rank else a.num_heads // a.num_kv_heads


def by_bandwidth(total: int, block: int, gpus: Sequence[Gpu], wish: Wish, name: str) -> tuple[int, ...]:
    """`total` rows or columns in blocks, by bandwidth alone, or as the user gave them."""
    if name in wish.fixed:
        return checked(wish.fixed[name], total, name)
    if "weights" in wish.fixed:
        return tuple(size * block for size in Split.weighted(total // block, wish.fixed["weights"]).sizes)
    sizes = minimax(total // block, [1.0 / (gpu.bandwidth * gpu.laws.memory) for gpu in gpus])
    assert sizes is not None
    return tuple(size * block for size in sizes)


def checked(sizes: Sequence[float], total: int, name: str) -> tuple[int, ...]:
    """What the user gave, whole numbers that sum to `total`. Raises ConfigError."""
    whole = tuple(int(size) for size in sizes)
    if any(size != int(size) for size in sizes) or sum(whole) != total:
        raise ConfigError(
            f"--split {name}: {', '.join(f'{size:g}' for size in sizes)} sum to {sum(sizes):g}, not {total}",
            hint=f"--split {name}={','.join(map(str, nearest(sizes, total)))}",
        )
    return whole


def nearest(sizes: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers in the proportion of `sizes` that sum to `total`; even ones where there is no proportion."""
    return Split.weighted(total, sizes if sum(sizes) > 0 else (1.0,) * len(sizes)).sizes


def countable(served: Served, name: str, num_gpus: int) -> int:
    """How many units of the kind `name` there are to divide with `--split`; of "weights", what sums to a hundred."""
    main = served.expert_ffn or served.dense_ffn
    assert main is not None
    if name == "heads":
        return served.attention.num_heads // heads_of_unit(served)
    if name == "ffn":
        return main.inner // column_block(main.inner, num_gpus, served.weight_bytes)
    return {"experts": main.num_experts, "vocabulary": served.shape.vocab_size}.get(name, 100)


def ends(served: Served, gpus: Sequence[Gpu], wish: Wish) -> tuple[Shares, list[float]]:
    """Shares of everything but heads and feed-forward, and their bytes with what every GPU has."""
    shape, moe, dense = served.shape, served.expert_ffn, served.dense_ffn
    rows_block = next(b for b in (64, 32, 16, 8, 4, 2, 1) if shape.vocab_size % b == 0)
    rows = by_bandwidth(shape.vocab_size, rows_block, gpus, wish, "vocabulary")

    def columns(inner: int) -> tuple[int, ...]:
        block = column_block(inner, len(gpus), served.weight_bytes) if inner else 1
        return by_bandwidth(inner, block, gpus, wish, "-") if inner else (0,) * len(gpus)

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


def units_of(served: Served, base: Shares, wish: Wish) -> Units:
    """Heads (or groups of them) and feed-forward blocks (or experts), with their bytes."""
    shape, moe, dense = served.shape, served.expert_ffn, served.dense_ffn
    group = served.query_elements * heads_of_unit(served) + served.kv_elements
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


def filled(
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
    ratio, main = heads_of_unit(served), served.expert_ffn or served.dense_ffn
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
