"""Which matrices become FP8, and which share a scale. No torch.

FP8 are the matrices that meet every token's activations: attention, dense feed-forward, experts, shared experts. They
are all but a few percent of the bytes. What decides stays as it is: routers and shared-expert gates (a token sent to
another expert is another function), norms, biases, the embedding, and the head, whose error every logit would show.

Engines fuse matrices that read the same activations: q, k and v; gate and up. Hence two rules for such a group:

- `tensor`: one scale for the whole group. Engines keep one number for a fused matrix; given several they take the
  largest and round the others again (vLLM), or take whichever came last (the Skywork fork: w1 and w3).
- `block`: all of a group or none. A matrix with a side that is no multiple of 128 stays as it is, because transformers
  loads it without its scales and engines cut fused matrices at block borders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skymoe.spec.quantization import DEFAULT_BLOCK, Fp8Scheme
from skymoe.weights.names import Place

_LAYER = r"layers\.\d+"
_MATMULS = re.compile(rf"{_LAYER}\.(attention\.[qkvo]|(mlp|moe\.shared)\.(gate|up|down))\.weight")
_EXPERTS = re.compile(rf"{_LAYER}\.moe\.experts\.(gate_up|down)")
_FUSED = re.compile(r"\.(attention\.[qkv]|(?:mlp|shared)\.(?:gate|up))\.weight")


@dataclass(frozen=True)
class Choice:
    """What happens to the tensors of a model.

    Attributes:
        groups: places of the matrices that become FP8; those of a group are done together.
        unfit: file names of matrices that would be FP8, but for their shape.
    """

    groups: tuple[tuple[Place, ...], ...]
    unfit: tuple[str, ...]


def choose(table: Mapping[str, Place], scheme: Fp8Scheme) -> Choice:
    """Divide the tensors of a model directory (`weights.names.tensor_table`)."""
    groups: dict[object, list[tuple[str, Place]]] = {}
    for name, place in table.items():
        if is_matmul(place):
            groups.setdefault(_group(place), []).append((name, place))
    unfit = {
        key
        for key, group in groups.items()
        if scheme is Fp8Scheme.BLOCK and not all(_is_whole_blocks(place.shape) for _, place in group)
    }
    chosen: list[tuple[Place, ...]] = []
    for key, group in groups.items():
        places = tuple(place for _, place in group)
        if key not in unfit:
            chosen += [places] if scheme is Fp8Scheme.TENSOR else [(place,) for place in places]
    return Choice(tuple(chosen), tuple(name for key in groups if key in unfit for name, _ in groups[key]))


def is_matmul(place: Place) -> bool:
    """Whether policy wants this matrix in FP8."""
    return bool(_MATMULS.fullmatch(place.parameter) or _EXPERTS.fullmatch(place.parameter))


def not_converted(table: Mapping[str, Place], quantized: Iterable[Place]) -> tuple[str, ...]:
    """The modules with a matrix that stays as it is, as every format lists them; experts of a layer as one module.

    The head is always among them: where it is tied it has no tensor, but transformers has the module.
    """
    done = set(quantized)
    modules = {"lm_head": None}
    for name, place in table.items():
        if place not in done and len(place.shape) == 2:
            module = name.removesuffix(".weight")
            modules[re.sub(r"(\.experts)\.\d+\.\w+$", r"\1", module)] = None
    return tuple(modules)


def _group(place: Place) -> object:
    """Equal for places that engines fuse."""
    if place.expert is not None:
        return place.parameter, place.expert
    return _FUSED.sub(lambda match: f".{match[1].rpartition('.')[0]}", place.parameter)


def _is_whole_blocks(shape: tuple[int, ...]) -> bool:
    return all(size % side == 0 for size, side in zip(shape, DEFAULT_BLOCK, strict=True))
