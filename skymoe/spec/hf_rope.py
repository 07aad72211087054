"""Rotary embedding in a Hugging Face config: `rope_parameters` (transformers v5) and `rope_theta` + `rope_scaling`
(before).

Both forms are read and both are written, so that old and new tools see one model. When a file carries both and they
disagree it is refused: which of the two a tool believes depends on its version. A wrong or dropped rope field is the
classic silent conversion defect (the model works, worse, on long texts only), hence no guessing here: a variant we do
not compute, or a rotation of a part of the head, is refused by name.

One quirk kept from transformers: `dynamic` scaling always stretches relative to `max_position_embeddings`; an
`original_max_position_embeddings` beside it is ignored there, and so here.
"""

from __future__ import annotations

from typing import Any

from skymoe.spec.fields import Fields
from skymoe.spec.model import RopeScaling, RopeSpec

_WITH_ORIGINAL = (RopeScaling.YARN, RopeScaling.LLAMA3)


def read_rope(fields: Fields, *, max_position: int, default_theta: float) -> RopeSpec:
    """The RopeSpec of a config.

    Raises:
        FormatError: an unknown variant, partial rotary, per-layer-type parameters, or two forms that disagree.
    """
    _refuse_partial(fields)
    parameters, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    legacy_theta = fields.number("rope_theta", default_theta)
    original = fields.integer("original_max_position_embeddings", max_position)
    found: list[RopeSpec] = []
    for section in (parameters, scaling):
        if section is None:
            continue
        theta = section.number("rope_theta", legacy_theta)
        if "rope_theta" in fields and theta != legacy_theta:
            raise section.error("rope_theta", f"is {theta}, but the model's rope_theta is {legacy_theta}")
        _refuse_other_original(fields, section)
        found.append(_variant(section, theta, max_position, original))
    if len(found) == 2 and found[0] != found[1]:
        raise fields.error("rope_scaling", "and rope_parameters describe different rotary embeddings")
    return found[0] if found else RopeSpec(theta=legacy_theta)


def write_rope(rope: RopeSpec, *, max_position: int, old: bool = False) -> dict[str, Any]:
    """The config fields of `rope`: `rope_parameters`, `rope_theta`, `rope_scaling`.

    With `old` the variant in `rope_scaling` is called `type`, as code from before transformers 4.43 wants it.
    """
    scaling: dict[str, Any] = {"rope_type": rope.scaling.value}
    if rope.scaling is not RopeScaling.NONE:
        scaling["factor"] = rope.factor
    if rope.scaling in _WITH_ORIGINAL:
        scaling["original_max_position_embeddings"] = rope.original_max_position or max_position
    if rope.scaling is RopeScaling.LLAMA3:
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling is RopeScaling.YARN:
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = {
            "attention_factor": rope.attention_factor,
            "mscale": rope.mscale or None,
            "mscale_all_dim": rope.mscale_all_dim or None,
        }
        scaling |= {name: value for name, value in optional.items() if value is not None}
    legacy = {"type" if old and name == "rope_type" else name: value for name, value in scaling.items()}
    return {
        "rope_parameters": scaling | {"rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling is RopeScaling.NONE else legacy,
    }


def _variant(section: Fields, theta: float, max_position: int, original: int) -> RopeSpec:
    name = section.text("rope_type", section.text("type", RopeScaling.NONE.value))
    try:
        kind = RopeScaling(name)
    except ValueError:
        known = ", ".join(RopeScaling)
        raise section.error("rope_type", f"{name!r} is not supported", hint=f"supported variants: {known}") from None
    _refuse_nested(section)
    _refuse_partial(section)
    if kind is RopeScaling.NONE:
        return RopeSpec(theta=theta)
    original = section.integer("original_max_position_embeddings", original)
    factor = section.number("factor", max_position / original if kind is RopeScaling.YARN else None)
    carried = original if kind in _WITH_ORIGINAL and original != max_position else None
    common = RopeSpec(theta=theta, scaling=kind, factor=factor, original_max_position=carried)
    if kind is RopeScaling.LLAMA3:
        return _llama3(section, common)
    return _yarn(section, common) if kind is RopeScaling.YARN else common


def _llama3(section: Fields, common: RopeSpec) -> RopeSpec:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if not 0 < low < high:
        raise section.error("high_freq_factor", f"must be above low_freq_factor and both positive, got {low}, {high}")
    return RopeSpec(
        theta=common.theta,
        scaling=common.scaling,
        factor=common.factor,
        original_max_position=common.original_max_position,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(section: Fields, common: RopeSpec) -> RopeSpec:
    fast, slow = section.number("beta_fast", 32.0), section.number("beta_slow", 1.0)
    if not 0 < slow <= fast:
        raise section.error("beta_fast", f"must be at least beta_slow and both positive, got {fast} and {slow}")
    attention = section.number("attention_factor") if "attention_factor" in section else None
    if attention is not None and attention <= 0:
        raise section.error("attention_factor", f"must be positive, got {attention}")
    return RopeSpec(
        theta=common.theta,
        scaling=common.scaling,
        factor=common.factor,
        original_max_position=common.original_max_position,
        beta_fast=fast,
        beta_slow=slow,
        truncate=section.flag("truncate", True),
        attention_factor=attention,
        mscale=section.number("mscale", 0.0),
        mscale_all_dim=section.number("mscale_all_dim", 0.0),
    )


def _refuse_other_original(fields: Fields, section: Fields) -> None:
    """transformers lets the outer field win, other tools the inner one."""
    name = "original_max_position_embeddings"
    if name in fields and name in section and fields.raw(name) != section.raw(name):
        raise section.error(name, f"is {section.integer(name)}, but the model's is {fields.integer(name)}")


def _refuse_partial(fields: Fields) -> None:
    factor = fields.number("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise fields.error("partial_rotary_factor", f"is {factor}: rotating a part of each head is not supported")


def _refuse_nested(section: Fields) -> None:
    for name, value in section.unread().items():
        if isinstance(value, dict):
            raise section.error(name, "is an object: a rotary embedding per layer type is not supported")
