"""Which tensor of A belongs to which tensor of B. No torch.

Tensors are paired by their logical place, so a Mixtral directory (`block_sparse_moe.experts.3.w1`), Qwen's names and a
layer that is stored fused all meet at `layers.0.moe.experts.3.gate`. A tied head is the embedding. What has no partner
is a pair with one side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from skymoe.convert.plan import Source
from skymoe.spec.model import ModelSpec
from skymoe.weights.header import TensorInfo
from skymoe.weights.names import Place

EMBEDDING, HEAD = "embed.weight", "head.weight"
_EXPERT = re.compile(r"layers\.(\d+)\.moe\.experts\.(\d+)\.(gate|up|down)")
_MOE = re.compile(r"layers\.(\d+)\.moe\.")


@dataclass(frozen=True)
class Pair:
    """Two tensors to compare, or one that stands alone.

    Attributes:
        name: logical place, or name in the files.
        left, right: where their values are; None on the side that has none.
        expected: it is no difference that the other side is missing.
        expert: layer and expert, where an expert is compared with a dense feed-forward.
    """

    name: str
    left: Source | None
    right: Source | None
    expected: bool = False
    expert: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of both sides."""
        return sum(side.num_bytes for side in (self.left, self.right) if side)


def logical_names(sources: Mapping[Place, Source]) -> dict[str, Source]:
    """The tensors of a model by their logical place, in file order."""
    return {_logical_name(place): source for place, source in sources.items()}


def raw_names(tensors: Mapping[str, TensorInfo], number: int) -> dict[str, Source]:
    """The tensors of a directory by their names in the files."""
    return {name: Source(number, name, info) for name, info in tensors.items()}


def pair(left: Mapping[str, Source], right: Mapping[str, Source]) -> list[Pair]:
    """Every tensor with its partner of the same name, in A's order; then what only B has."""
    pairs = [Pair(name, source, right.get(name)) for name, source in left.items()]
    return pairs + [Pair(name, None, source) for name, source in right.items() if name not in left]


def with_heads(left: Mapping[str, Source], right: Mapping[str, Source]) -> tuple[dict[str, Source], dict[str, Source]]:
    """Both sides; where only one has a head of its own, the other's head is its embedding."""
    a, b = dict(left), dict(right)
    for one, other in ((a, b), (b, a)):
        if HEAD in one and HEAD not in other and EMBEDDING in other:
            other[HEAD] = other[EMBEDDING]
    return a, b


def pair_experts(left: Mapping[str, Source], right: Mapping[str, Source], dense: ModelSpec) -> list[Pair]:
    """As `pair`, but where a layer of A is dense and B's has experts, each expert meets A's feed-forward.

    Args:
        left, right: tensors by logical place.
        dense: the spec of A.
    """
    used: set[str] = set()
    pairs = []
    for name, source in right.items():
        layer = _MOE.match(name)
        if layer is None or dense.is_moe_layer(int(layer[1])):
            continue
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            pairs.append(Pair(name, None, source, expected=True))
            continue
        partner = f"layers.{expert[1]}.mlp.{expert[3]}.weight"
        used.add(partner)
        pairs.append(Pair(name, left.get(partner), source, expert=(int(expert[1]), int(expert[2]))))
    taken = {one.name for one in pairs}
    rest = {name: source for name, source in right.items() if name not in taken}
    return pair({name: source for name, source in left.items() if name not in used}, rest) + pairs


def _logical_name(place: Place) -> str:
    if place.expert is None:
        return place.parameter
    experts = place.parameter.rpartition(".")[0]
    matrix = "down" if place.rows is None else "gate" if place.rows[0] == 0 else "up"
    return f"{experts}.{place.expert}.{matrix}"
