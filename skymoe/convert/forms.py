"""The same function in another architecture's terms: what must change in a spec, and what may. No torch.

An architecture carries a model when `spec.hf_families.uncarried` has nothing to say. Where it has, an *adapter* may
help: a change of the spec that does not change the function, such as a shared expert that adds exactly zero for a
format that insists on one. An adapter is taken only if it removes a reason, and each one taken is told to the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from skymoe.spec.hf_families import uncarried
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec

ZERO_SHARED_FFN_SIZE = 128  # of a shared expert that adds zero: no tool has trouble with such a width


@dataclass(frozen=True)
class Unused:
    """Parts of a model that compute nothing, because their values are zero in every layer. Its spec does not say it."""

    shared_expert: bool = False
    expert_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False


EVERYTHING_UNUSED = Unused(shared_expert=True, expert_bias=True, qkv_bias=True, o_bias=True)


@dataclass(frozen=True)
class Form:
    """A model in the terms of one architecture.

    Attributes:
        spec: in that architecture.
        adapters: what was changed without a change of the function, one sentence each.
        folded: gate normalization was replaced by a temperature per layer, which is approximate.
        missing: why the architecture cannot carry it all the same; empty when it can.
    """

    spec: ModelSpec
    adapters: tuple[str, ...]
    folded: bool
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Adapter:
    """`change` answers None where it does not apply; `told` is the sentence for the report."""

    told: str
    change: Callable[[ModelSpec, Unused], ModelSpec | None]


def form_of(spec: ModelSpec, architecture: Architecture, unused: Unused, *, fold: bool = False) -> Form:
    """`spec` in the terms of `architecture`.

    Args:
        spec: any model.
        architecture: what it shall be.
        unused: what the values of the model say.
        fold: whether gate normalization may be folded into the router.
    """
    form, told, folded = replace(spec, architecture=architecture), [], False
    for adapter in (*_EXACT, *([_FOLD] if fold else [])):
        changed = adapter.change(form, unused)
        if changed is not None and len(uncarried(changed)) < len(uncarried(form)):
            form, folded = changed, adapter is _FOLD
            told.append(adapter.told)
    return Form(form, tuple(told), folded, uncarried(form))


# ---- the adapters, each exact but the last


def _with_zero_shared(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return None if spec.moe is None or spec.moe.shared_ffn_size else _moe(spec, shared_ffn_size=ZERO_SHARED_FFN_SIZE)


def _without_shared(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return _moe(spec, shared_ffn_size=0) if spec.moe and unused.shared_expert else None


def _without_expert_bias(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return _moe(spec, expert_bias=False) if spec.moe and unused.expert_bias else None


def _without_qkv_bias(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return replace(spec, qkv_bias=False) if unused.qkv_bias else None


def _without_o_bias(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return replace(spec, o_bias=False) if unused.o_bias else None


def _with_zero_biases(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return replace(spec, qkv_bias=True, o_bias=True) if spec.qkv_bias or spec.o_bias else None


def _all_experts(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    return _moe(spec, norm_topk=True) if spec.moe and spec.moe.top_k == spec.moe.num_experts else None


def _one_expert(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    moe = spec.moe
    plain = moe is not None and moe.top_k == 1 and moe.norm_topk and not moe.expert_bias
    return _moe(spec, gate_norm=None) if plain else None


def _unbiased_deviation(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    """sigma_0 = sigma_1 sqrt((n - 1) / n), so scale and eps grow by the inverse of that root."""
    if spec.moe is None or spec.moe.gate_norm is None or spec.moe.num_experts < 2:
        return None
    norm, n = spec.moe.gate_norm, spec.moe.num_experts
    root = math.sqrt(n / (n - 1))
    same = GateNormSpec(scale=norm.scale * root, ddof=1, eps=norm.eps * root, subtract_mean=norm.subtract_mean)
    return _moe(spec, gate_norm=same) if norm.ddof == 0 else None


def _fold(spec: ModelSpec, unused: Unused) -> ModelSpec | None:
    moe = spec.moe
    return _moe(spec, gate_norm=None) if moe and moe.gate_norm and not moe.expert_bias else None


def _moe(spec: ModelSpec, **changes: Any) -> ModelSpec:
    assert spec.moe is not None
    return replace(spec, moe=replace(spec.moe, **changes))


_ZERO = "0 (checked on its values): left out"
_EXACT = (
    _Adapter(f"a shared expert of width {ZERO_SHARED_FFN_SIZE} that adds exactly 0", _with_zero_shared),
    _Adapter(f"the shared expert adds exactly {_ZERO}", _without_shared),
    _Adapter(f"the expert bias is {_ZERO}", _without_expert_bias),
    _Adapter(f"the q/k/v bias is {_ZERO}", _without_qkv_bias),
    _Adapter(f"the output-projection bias is {_ZERO}", _without_o_bias),
    _Adapter("attention biases of 0 where there were none", _with_zero_biases),
    _Adapter("every token uses all experts, so renormalizing changes nothing: renormalized", _all_experts),
    _Adapter("a token's one weight is always 1, so the gate normalization changes nothing: left out", _one_expert),
    _Adapter("the gate's population deviation as the unbiased one, its scale adjusted", _unbiased_deviation),
)
_FOLD = _Adapter("gate normalization replaced by one temperature per layer: approximate", _fold)
