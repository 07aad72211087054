"""Does a part of the source compute nothing? Its values say so, not its config.

A shared expert adds exactly zero when one of its three matrices is all zero: it is down (silu(gate x) * (up x)), and
silu(0) = 0. Its sigmoid gate cannot close it: at a gate of zero the factor is 1/2. A bias of zeros is none. The first
tensor that is not zero settles it, so a model that cannot be exported is refused after a look at a few.
"""

from __future__ import annotations

from skymoe.convert.forms import Unused
from skymoe.convert.parents import Parent
from skymoe.convert.plan import Source
from skymoe.convert.replay import read_source


def find_unused(parent: Parent) -> Unused:
    """What the values of `parent` say. Reads its biases and shared experts, one tensor at a time."""
    sources = parent.by_parameter()

    def zero(ending: str) -> bool:
        return all(_is_zero(parent, source) for name, source in sources.items() if name.endswith(ending))

    def closed(prefix: str) -> bool:
        return any(_is_zero(parent, sources[f"{prefix}{name}.weight"]) for name in ("down", "gate", "up"))

    shared = [name.removesuffix("down.weight") for name in sources if name.endswith(".moe.shared.down.weight")]
    return Unused(
        shared_expert=bool(shared) and all(map(closed, shared)),
        expert_bias=parent.spec.moe is not None and parent.spec.moe.expert_bias and zero(".router.expert_bias"),
        qkv_bias=parent.spec.qkv_bias and all(zero(f".attention.{name}.bias") for name in "qkv"),
        o_bias=parent.spec.o_bias and zero(".attention.o.bias"),
    )


def _is_zero(parent: Parent, source: Source) -> bool:
    return not bool(read_source([parent], source).count_nonzero())
