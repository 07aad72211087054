"""What the exported model is: its form in the target's architecture, or the reasons why it has none. No torch.

What a format cannot carry is refused with every reason and the formats that can: an export drops nothing silently.
"""

from __future__ import annotations

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.convert.forms import EVERYTHING_UNUSED, Form, Unused, form_of
from skymoe.convert.gguf import gguf_misreads
from skymoe.convert.grouped_mm import grouped_mm_remarks
from skymoe.export.config import Format
from skymoe.spec.model import Architecture, ModelSpec

_NATIVE = (Architecture.MIXTRAL, Architecture.QWEN2_MOE, Architecture.QWEN3_MOE, Architecture.OLMOE)


def target_form(source: ModelSpec, format_: Format, unused: Unused, *, fold: bool = False) -> Form:
    """`source` in `format_`.

    Args:
        source: what is exported.
        format_: what it becomes.
        unused: what the values of the source say.
        fold: gate normalization shall be folded into the router, which is approximate.

    Raises:
        ConfigError: the format cannot carry the model; or there is nothing to fold.
    """
    form = form_of(source, architecture_of(format_, source), unused, fold=fold)
    if form.missing:
        what = f"the {format_} format cannot carry this model"
        raise ConfigError(what, why="; ".join(form.missing), hint=_way_out(source, format_, unused, fold=fold))
    if fold and not form.folded:
        why = f"{format_} carries this model exactly" if source.moe and source.moe.gate_norm else "this model has none"
        raise ConfigError("there is no gate normalization to fold", why=why, hint="leave out --fold-gate-norm")
    return form


def architecture_of(format_: Format, source: ModelSpec) -> Architecture:
    """The architecture that `format_` means for `source`."""
    if format_ is Format.SKYWORK:
        return Architecture.SKYWORK_MOE if source.moe else Architecture.SKYWORK
    return Architecture(format_.value)


def needs_values(source: ModelSpec, format_: Format) -> bool:
    """Whether a look at the source's values could remove a reason against this export."""
    architecture = architecture_of(format_, source)
    blind, best = (form_of(source, architecture, unused) for unused in (Unused(), EVERYTHING_UNUSED))
    return len(best.missing) < len(blind.missing)


def remarks(spec: ModelSpec, dtype: DType) -> tuple[str, ...]:
    """What the user should know about a model in its format, mostly of `dtype`, beyond that it was written."""
    told = []
    moe = spec.moe
    if moe and spec.num_dense_layers and spec.architecture is not Architecture.SKYMOE:
        told.append(f"{spec.num_dense_layers} dense layers stay dense (mlp_only_layers)")
    if moe and moe.num_experts & (moe.num_experts - 1):
        told.append(f"{moe.num_experts} experts: some tools want a power of two")
    if spec.architecture in _NATIVE and (misreads := gguf_misreads(spec)):
        told.append(f"no GGUF of it computes the same: {'; '.join(misreads)}")
    if spec.architecture is Architecture.SKYWORK_MOE and moe and moe.gate_norm:
        told.append("the released Skywork vLLM fork drops gate normalization on its main path")
    return (*told, *grouped_mm_remarks(spec, dtype))


def _way_out(source: ModelSpec, format_: Format, unused: Unused, *, fold: bool) -> str:
    carriers = [each for each in Format if not form_of(source, architecture_of(each, source), unused).missing]
    hint = " or ".join(f"--format {each}" for each in carriers) + " carries it exactly"
    if source.moe is None:
        return f"{hint}; or make it a mixture of experts first: skymoe upcycle"
    foldable = not fold and not form_of(source, architecture_of(format_, source), unused, fold=True).missing
    return f"{hint}; or, approximately: --fold-gate-norm --text FILE" if foldable else hint
