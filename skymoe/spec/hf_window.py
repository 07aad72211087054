"""Sliding windows in a Hugging Face config: in every layer, in none, or in some.

Mistral says `sliding_window` alone; Qwen says `use_sliding_window`, `max_window_layers` or an explicit `layer_types`. A
ModelSpec names the layers. Where a file does not, the transformers class decides, and the classes differ: Qwen2 and
Qwen3 slide from layer `max_window_layers` on, Qwen2-MoE in every second layer below it. Tools older than `layer_types`
know neither; we always write it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from skymoe.spec.fields import Fields
from skymoe.spec.model import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def read_whole_window(fields: Fields, num_layers: int, default: int | None) -> dict[str, Any]:
    """One window for all layers, from `sliding_window`; `default` where the field is absent."""
    window = read_window(fields) if fields.has("sliding_window") else default
    require_layer_types(fields, num_layers, FULL if window is None else SLIDING)
    return {"sliding_window": window}


def read_layer_window(
    fields: Fields, num_layers: int, default: Iterable[int], *, switch: bool | None = None
) -> dict[str, Any]:
    """Window size and the layers that have it, from `layer_types` where given, else `default`."""
    enabled = fields.flag("use_sliding_window", False) if switch is None else switch
    window = (read_window(fields) if fields.has("sliding_window") else 4096) if enabled else None
    kinds = _checked_layer_types(fields, num_layers)
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING) if kinds else tuple(default)
    if kinds and layers and window is None:
        raise fields.error("layer_types", "names sliding layers, but no sliding window is in use")
    if window is None or not layers:
        return {}
    return {"sliding_window": window, "sliding_layers": None if len(layers) == num_layers else layers}


def write_layer_window(spec: ModelSpec) -> dict[str, Any]:
    """Qwen's fields, with the layers spelled out."""
    sliding = (layer for layer in range(spec.num_layers) if spec.window(layer) is not None)
    return {
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "max_window_layers": next(sliding, spec.num_layers),
        "layer_types": layer_types(spec),
    }


def layer_types(spec: ModelSpec) -> list[str]:
    """The kind of attention of every layer, in transformers' words."""
    return [FULL if spec.window(layer) is None else SLIDING for layer in range(spec.num_layers)]


def read_window(fields: Fields) -> int | None:
    """`sliding_window` as a size; None when null."""
    return fields.integer("sliding_window") if "sliding_window" in fields else None


def _checked_layer_types(fields: Fields, num_layers: int) -> tuple[str, ...]:
    kinds = fields.texts("layer_types")
    if kinds and len(kinds) != num_layers:
        raise fields.error("layer_types", f"names {len(kinds)} layers, the model has {num_layers}")
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise fields.error("layer_types", f"names {sorted(unknown)[0]!r}, which is not supported")
    return kinds


def refuse_window(fields: Fields, num_layers: int) -> None:
    """An architecture without windows: one in use, or sliding layers, are refused."""
    require_layer_types(fields, num_layers, FULL)
    if fields.flag("use_sliding_window", True) and "sliding_window" in fields:
        raise fields.error("sliding_window", "is set, but this architecture has no window", hint="set it to null")


def require_layer_types(fields: Fields, num_layers: int, expected: str) -> None:
    """Refuse a `layer_types` that says anything else than `expected`."""
    if set(_checked_layer_types(fields, num_layers)) - {expected}:
        raise fields.error("layer_types", f"must be {expected} in every layer of this architecture")
