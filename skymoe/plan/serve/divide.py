"""Which GPU gets which units: the fastest division that fits, equal GPUs or not (`threshold.py` has the proof).

The time of a unit is its bytes over the GPU's memory bandwidth, weights and the keys and values of `load_tokens`
together: decoding reads all of it every step. Vocabulary, shared experts and the dense layers of a mixture are divided
first, by bandwidth alone; heads and feed-forward share what memory is left. Where there are more GPUs than key/value
heads, the heads are replicated: consecutive GPUs form a team per key/value head and divide its query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.serve.model import Served
from skymoe.plan.serve.pieces import Wish, ends, filled, heads_of_unit, units_of
from skymoe.plan.serve.shares import Shares
from skymoe.plan.serve.threshold import Bin, divide
from skymoe.plan.serve.wished import as_wished, replicated


def choose(served: Served, gpus: Sequence[Gpu], rooms: Sequence[float], wish: Wish) -> Shares | None:
    """The division of `served` over `gpus` with `rooms` bytes each; None when it does not fit."""
    if not served.attention.kv_rank and len(gpus) > served.attention.num_kv_heads:
        return replicated(served, gpus, rooms, wish)
    base, fixed_bytes = ends(served, gpus, wish)
    left = [room - used for room, used in zip(rooms, fixed_bytes, strict=True)]
    if min(left) < 0:
        return None
    members = _bins(gpus, wish)
    units = units_of(served, base, wish)
    per_head = units.attention_bytes / units.layers
    speed = [gpu.bandwidth * gpu.laws.memory for gpu in gpus]
    group = served.query_elements * heads_of_unit(served) + served.kv_elements
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
        return as_wished(served, base, units, bins, wish)
    found = divide(bins, units)
    if found is None:
        return None
    return filled(served, base, units, members, found.attention, found.ffn)


def whole_model(served: Served, gpu: Gpu) -> Shares:
    """Everything of each layer on one GPU: a stage of a pipeline."""
    shares = choose(served, (gpu,), (float("1e30"),), Wish(kv_tokens=1, load_tokens=1))
    assert shares is not None
    return shares


def _bins(gpus: Sequence[Gpu], wish: Wish) -> list[list[int]]:
    """GPUs that share one remainder."""
    if not wish.rotate or wish.fixed:
        return [[g] for g in range(len(gpus))]
    kinds: dict[Gpu, list[int]] = {}
    for index, gpu in enumerate(gpus):
        kinds.setdefault(gpu, []).append(index)
    return list(kinds.values())
