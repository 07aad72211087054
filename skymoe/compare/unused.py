"""Does a part that only one of the models has compute nothing? Its values say so.

Some formats insist on a part, so an exact export adds one that adds exactly zero: a shared expert (Qwen2-MoE), biases
of attention (Qwen3-MoE); and it leaves such a part out where a format has none. Neither makes another model.

- A shared expert is sigmoid(gate' x) * (down (silu(gate x) * (up x))): zero when one of its three matrices is, as
  long as the other numbers are finite (0 times infinity is none). Its own gate cannot close it: sigmoid(0) is 1/2.
- A bias of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from skymoe.compare.measure import blocks_of
from skymoe.compare.pairs import Pair
from skymoe.weights.reader import WeightsReader

_SHARED = re.compile(r"(layers\.\d+\.moe\.shared)(?:\.(?:gate|up|down)|_gate)\.weight")
_BIAS = re.compile(r"layers\.\d+\..*(?:\.bias|\.expert_bias)")
_FIELDS = {
    "moe.shared_ffn_size": ("layers.*.moe.shared.*", "layers.*.moe.shared_gate.*"),
    "moe.expert_bias": ("layers.*.moe.router.expert_bias",),
    "qkv_bias": tuple(f"layers.*.attention.{name}.bias" for name in "qkv"),
    "o_bias": ("layers.*.attention.o.bias",),
    "mlp_bias": ("layers.*.mlp.*.bias",),
}


def find_unused(
    pairs: Sequence[Pair], left: WeightsReader, right: WeightsReader, *, block_bytes: int
) -> frozenset[str]:
    """Names of the tensors without a partner that add nothing. `block_bytes`: the most of a tensor held at a time."""

    def blocks(pair: Pair) -> Iterator[Tensor]:
        reader, source = (left, pair.left) if pair.left else (right, pair.right)
        assert source is not None
        return blocks_of(reader, source, block_bytes)

    experts: dict[str, list[Pair]] = {}
    found = []
    for pair in pairs:
        if (pair.left and pair.right) or pair.expected:
            continue
        if shared := _SHARED.fullmatch(pair.name):
            experts.setdefault(shared[1], []).append(pair)
        elif _BIAS.fullmatch(pair.name) and _is_zero(blocks(pair)):
            found.append(pair.name)
    for group in experts.values():
        if _adds_zero(group, blocks):
            found += [pair.name for pair in group]
    return frozenset(found)


def unused_fields(pairs: Sequence[Pair], unused: frozenset[str]) -> frozenset[str]:
    """Fields of ModelSpec that say nothing but that one of the models has unused tensors."""
    fields = set()
    for field, patterns in _FIELDS.items():
        names = [pair.name for pair in pairs if any(fnmatchcase(pair.name, pattern) for pattern in patterns)]
        if names and unused.issuperset(names):
            fields.add(field)
    return frozenset(fields)


def _adds_zero(shared: Sequence[Pair], blocks: Callable[[Pair], Iterator[Tensor]]) -> bool:
    matrices = [pair for pair in shared if ".shared." in pair.name]
    if len(matrices) != 3 or not any(_is_zero(blocks(pair)) for pair in matrices):
        return False
    return all(bool(block.isfinite().all()) for pair in shared for block in blocks(pair))


def _is_zero(blocks: Iterator[Tensor]) -> bool:
    return all(not bool(block.count_nonzero()) for block in blocks)
