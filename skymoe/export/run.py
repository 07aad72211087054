"""`skymoe export`: adapt the spec, plan, replay the plan one tensor at a time, measure, publish.

Exact or refused: what the target cannot carry is an error that names the formats that can. The one approximate way,
`fold_gate_norm`, is asked for by name, measured on held-out text, and refused when it changes the model too much.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.base.files import refuse_existing, refuse_source, resumable_directory
from skymoe.base.space import free_space
from skymoe.convert.apply import Read, make_common
from skymoe.convert.documents import write_documents, write_record
from skymoe.convert.exactness import Exactness
from skymoe.convert.forms import Form, Unused
from skymoe.convert.identity import FileHashes, conversion_fingerprint
from skymoe.convert.made import Made, record_parent
from skymoe.convert.measured import Receipt
from skymoe.convert.parents import Parent, open_parent
from skymoe.convert.plan import ConversionPlan, Operation
from skymoe.convert.receipt import measure
from skymoe.convert.replay import replay
from skymoe.convert.result import written
from skymoe.export.config import ExportConfig
from skymoe.export.fold import Fitted, fit, folded_router, held_out_change
from skymoe.export.plan import FoldedRouter, plan_export
from skymoe.export.result import ExportReport, Fold, PlannedExport
from skymoe.export.target import needs_values, remarks, target_form
from skymoe.export.unused import find_unused
from skymoe.model.save import write_json

FOLD_NAME = "fold.json"


def run(config: ExportConfig) -> ExportReport:
    """Export `config.source` to `config.out`.

    Raises:
        FormatError: the source is missing, broken, hostile or not supported.
        ConfigError: the format cannot carry the model, the fold changes it too much, or OUT exists.
        MissingExtraError: folding needs the package `tokenizers`.
        MachineError: no space, no permission.
    """
    started = time.monotonic()
    with open_parent(config.source, decode_to=_decode_to(config)) as parent:
        form = _form(parent, config)
        fitted = fit(parent, config) if form.folded else None
        factors = fitted.temperatures if fitted else None
        plan = plan_export(parent.sources, form.spec, dtype=config.dtype, factors=factors)
        dtype = _main_dtype(plan)
        options = config.model_dump(mode="json", exclude={"source", "out", "text", "overwrite", "dry_run"})
        fingerprint = conversion_fingerprint(plan, [parent], options)
        staged = resumable_directory(config.out, fingerprint, overwrite=config.overwrite)
        with staged as staging, FileHashes([config.source]) as hashes:
            replay(plan, [parent], staging, _make, name="export", max_shard_bytes=config.max_shard_bytes)
            write_documents(staging, form.spec, dtype, [config.source])
            fold = _accepted(fitted, staging, config) if fitted else None
            receipt = _receipt(parent, plan, form, staging, config)
            write_record(staging, form.spec, _made(parent, hashes.result()[0], form, dtype, options, fold), receipt)
            if fold is not None:
                write_json(staging / FOLD_NAME, asdict(fold))
    return _report(config, parent, form, dtype, receipt, fold, time.monotonic() - started)


def dry_run(config: ExportConfig) -> PlannedExport:
    """What `run` would do. Temperatures are not fitted.

    Raises:
        FormatError, ConfigError: as `run`.
    """
    with open_parent(config.source, decode_to=_decode_to(config)) as parent:
        form = _form(parent, config)
        factors = dict.fromkeys(form.spec.moe_layer_ids, None) if form.folded else None
        plan = plan_export(parent.sources, form.spec, dtype=config.dtype, factors=factors)
        promise = _promise(form)
        return PlannedExport(
            format=config.format,
            source_architecture=parent.spec.architecture.value,
            architecture=form.spec.architecture.value,
            adapters=form.adapters,
            remarks=remarks(form.spec, _main_dtype(plan)),
            exact=promise.exact,
            reason=promise.reason,
            plan=plan,
            disk_free=free_space(config.out),
        )


def _form(parent: Parent, config: ExportConfig) -> Form:
    refuse_source(config.out, config.source)
    refuse_existing(config.out, config.overwrite)  # before a fold is fitted
    unused = find_unused(parent) if needs_values(parent.spec, config.format) else Unused()
    return target_form(parent.spec, config.format, unused, fold=config.fold_gate_norm)


def _make(operation: Operation, read: Read) -> tuple[Tensor, ...]:
    if isinstance(operation, FoldedRouter):
        assert operation.factor is not None
        return (folded_router(read(operation.source), operation.factor),)
    return make_common(operation, read)


def _promise(form: Form) -> Exactness:
    if form.folded:
        why = "one temperature per layer stands for a gate normalization that depends on the token"
        return Exactness(False, f"{why}; a router still chooses the same experts, their weights change a little")
    changes = f"; {'; '.join(form.adapters)}" if form.adapters else ""
    return Exactness(True, f"the same tensors under the names of {form.spec.architecture}{changes}")


def _accepted(fitted: Fitted, staging: Path, config: ExportConfig) -> Fold:
    fold = held_out_change(fitted, staging, config)
    if fold.kl > config.max_kl:
        raise ConfigError(
            f"folding the gate normalization changes the model too much: KL {fold.kl:.3g} nats per token on held-out "
            f"text, perplexity {fold.perplexity_after / fold.perplexity_before - 1:+.2%}",
            where=config.source,
            why=f"the limit is {config.max_kl:g} (max_kl)",
            hint="--format skymoe is exact; or train the router a little without the normalization; or raise --max-kl",
        )
    return fold


def _receipt(parent: Parent, plan: ConversionPlan, form: Form, staging: Path, config: ExportConfig) -> Receipt:
    rounded = bool(parent.reader.scaled) and _decode_to(config) is DType.BFLOAT16  # the receipt decodes FP8 to fp32
    narrowed = rounded or _main_dtype(plan).itemsize < parent.match.dtype.itemsize
    return measure(
        config.source,
        staging,
        _promise(form),
        num_tokens=config.receipt_tokens,
        seed=config.seed,
        narrowed=narrowed,
    )


def _made(
    parent: Parent, hashes: Mapping[str, str], form: Form, dtype: DType, options: Mapping[str, Any], fold: Fold | None
) -> Made:
    told = [*form.adapters, *remarks(form.spec, dtype)]
    if fold is not None:
        change = f"perplexity {fold.perplexity_before:.4g} -> {fold.perplexity_after:.4g}"
        told.append(f"on {fold.held_out_tokens} held-out tokens: KL {fold.kl:.3g} nats per token, {change}")
    return Made(
        command="export",
        method=f"{parent.spec.architecture} to {form.spec.architecture}",
        parents=(record_parent(parent, hashes),),
        summary=_promise(form).reason,
        options=options,
        remarks=tuple(told),
    )


def _decode_to(config: ExportConfig) -> DType:
    """What the weights of an FP8 source become on the way."""
    return DType.FLOAT32 if config.dtype is DType.FLOAT32 else DType.BFLOAT16


def _main_dtype(plan: ConversionPlan) -> DType:
    return next(target.dtype for target in plan.tensors if target.name == "model.embed_tokens.weight")


def _report(
    config: ExportConfig, parent: Parent, form: Form, dtype: DType, receipt: Receipt, fold: Fold | None, seconds: float
) -> ExportReport:
    return ExportReport(
        **asdict(written(config.out, seconds)),
        format=config.format,
        source_architecture=parent.spec.architecture.value,
        architecture=form.spec.architecture.value,
        adapters=form.adapters,
        remarks=remarks(form.spec, dtype),
        exact=receipt.exact,
        reason=receipt.reason,
        max_abs_dlogit=receipt.max_abs_dlogit,
        kl=receipt.kl,
        receipt=receipt,
        fold=fold,
    )
