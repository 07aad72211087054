"""Does the new model compute what the old one did, and which formats would keep that? No torch.

A job knows from its plan whether it is exact, in real arithmetic; the receipt (`receipt.py`) holds the promise against
the files. Which formats can carry a model is decided by `spec.hf_families.uncarried`, with the changes of form that
`forms.py` knows; `export_targets` asks about every format. Whether a part of a model happens to be zero, so that a
format without that part would do, is not known here: `skymoe export` looks at the values.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.convert.forms import Form, Unused, form_of
from skymoe.convert.gguf import gguf_misreads
from skymoe.spec.hf_families import MOE_ARCHITECTURES
from skymoe.spec.model import Architecture, ModelSpec

_OWN_NAMES = {Architecture.SKYWORK_MOE: "skywork"}
_NOT_NATIVE = (Architecture.SKYMOE, Architecture.SKYWORK_MOE)


@dataclass(frozen=True)
class Exactness:
    """Whether a conversion keeps the function, in real arithmetic, and why."""

    exact: bool
    reason: str


@dataclass(frozen=True)
class ExportTarget:
    """One format that a model could be exported to.

    Attributes:
        format: as in `skymoe export --format`; "gguf" is llama.cpp's, made by its own converter from an export.
        carries: the format can hold the model at all, if need be approximately.
        exact: it would compute the same.
        reason: why, or what has to be done.
    """

    format: str
    carries: bool
    exact: bool
    reason: str


def export_targets(spec: ModelSpec) -> tuple[ExportTarget, ...]:
    """What becomes of a mixture of experts in every format; empty for a dense model."""
    if spec.moe is None:
        return ()
    return (*(_target(spec, architecture) for architecture in MOE_ARCHITECTURES), _gguf(spec))


def _target(spec: ModelSpec, architecture: Architecture) -> ExportTarget:
    name = _OWN_NAMES.get(architecture, architecture.value)
    form = _best_form(spec, architecture)
    if form.folded and not form.missing:
        return ExportTarget(name, True, False, f"{'; '.join(form.adapters)} (--fold-gate-norm)")
    if not form.missing:
        return ExportTarget(name, True, True, "; ".join(form.adapters) or _remark(form.spec))
    return ExportTarget(name, False, False, "; ".join(form_of(spec, architecture, Unused()).missing))


def _remark(spec: ModelSpec) -> str:
    assert spec.moe is not None
    match spec.architecture:
        case Architecture.SKYMOE:
            return "carries everything; transformers needs trust_remote_code, or skymoe imported"
        case Architecture.SKYWORK_MOE if spec.moe.gate_norm:
            return "as released; the released vLLM fork drops gate normalization on its main path"
        case Architecture.SKYWORK_MOE:
            return "the names and fields of the released Skywork-MoE"
    return "a class of transformers, nothing changed"


def _gguf(spec: ModelSpec) -> ExportTarget:
    """llama.cpp's converter wants a class of transformers, and computes what it has built in for that class."""
    routes = [form for arch in MOE_ARCHITECTURES if arch not in _NOT_NATIVE for form in [_best_form(spec, arch)]]
    routes = [form for form in routes if not form.missing]
    if not routes:
        return ExportTarget("gguf", False, False, "llama.cpp's converter reads none of the formats that carry it")
    best = min(routes, key=lambda form: (len(gguf_misreads(form.spec)), form.folded))
    if misreads := gguf_misreads(best.spec):
        return ExportTarget("gguf", False, False, "; ".join(misreads))
    how = f"llama.cpp's converter, from an export to {best.spec.architecture}"
    folded = f"; {'; '.join(best.adapters)} (--fold-gate-norm)" if best.folded else ""
    return ExportTarget("gguf", True, not best.folded, how + folded)


def _best_form(spec: ModelSpec, architecture: Architecture) -> Form:
    """The exact form if there is one, else the folded one."""
    form = form_of(spec, architecture, Unused())
    return form_of(spec, architecture, Unused(), fold=True) if form.missing else form
