"""`skymoe quantize`: choose, plan, round one matrix at a time, measure, publish.

Each source tensor is read once; its codes are compared with it while both are in memory (the audit). Nothing is
calibrated: weights need no data, and activations are rounded by the engine while it runs.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError, FormatError
from skymoe.base.files import refuse_existing, refuse_source, resumable_directory
from skymoe.base.space import free_space
from skymoe.convert.apply import Read, make_common
from skymoe.convert.documents import write_documents, write_record
from skymoe.convert.exactness import Exactness
from skymoe.convert.identity import FileHashes, conversion_fingerprint
from skymoe.convert.made import Made, record_parent
from skymoe.convert.measured import Receipt
from skymoe.convert.parents import Parent, open_parent
from skymoe.convert.plan import Operation
from skymoe.convert.receipt import measure
from skymoe.convert.replay import replay
from skymoe.convert.result import Written, written
from skymoe.model.save import write_json
from skymoe.ops.fp8 import encode_scaled, largest, scales
from skymoe.quantize import audit
from skymoe.quantize.config import QuantizeConfig
from skymoe.quantize.plan import QuantizePlan, Rounded, ToFp8, plan_quantize, sources_of
from skymoe.quantize.result import Counts, PlannedQuantize, QuantizeReport, TensorError
from skymoe.quantize.words import remarks, summary
from skymoe.spec.named import preset_or_directory
from skymoe.spec.quantization import FIELD, Fp8Scheme, write_quantization
from skymoe.weights.buffers import torch_dtype

_PROMISE = Exactness(False, "the weights were rounded to FP8")


def run(config: QuantizeConfig) -> QuantizeReport:
    """Write `config.source` to `config.out` with FP8 weights.

    Raises:
        FormatError: the source is missing, broken, hostile or not supported, or holds NaN or infinity.
        ConfigError: OUT exists, or no matrix can be FP8.
        MachineError: no space, no permission.
    """
    assert config.out is not None
    started, source = time.monotonic(), _directory(config)
    with open_parent(source, decode_to=DType.FLOAT32) as parent:
        plan = _plan(parent, config)
        options = config.model_dump(mode="json", exclude={"source", "out", "overwrite", "dry_run"})
        fingerprint = conversion_fingerprint(plan.conversion, [parent], options)
        told = remarks(plan, parent.spec)
        staged = resumable_directory(config.out, fingerprint, overwrite=config.overwrite)
        with staged as staging, FileHashes([source]) as hashes:
            errors = _write(plan, parent, staging, config)
            receipt = measure(source, staging, _PROMISE, num_tokens=config.receipt_tokens, seed=config.seed)
            made = Made(
                command="quantize",
                method=f"fp8 {config.scheme}",
                parents=(record_parent(parent, hashes.result()[0]),),
                summary=summary(plan, errors),
                options=options,
                seed=config.seed,
                remarks=told,
            )
            write_record(staging, parent.spec, made, receipt)
    return _report(_counts(plan, told), errors, receipt, written(config.out, time.monotonic() - started))


def dry_run(config: QuantizeConfig) -> PlannedQuantize:
    """What `run` would do; `config.source` may be a preset.

    A preset's name wins over a directory of the same name, which can be given as `./name`: here, in `run`, and in
    `skymoe inspect`.

    Raises:
        FormatError: neither a preset nor a readable model directory.
        ConfigError: OUT is given and exists.
    """
    named = preset_or_directory(config.source)
    if not isinstance(named, Path):
        spec = named
        plan = plan_quantize(spec, sources_of(spec, DType.BFLOAT16), config.scheme)
    else:
        with open_parent(_directory(config), decode_to=DType.FLOAT32) as parent:
            spec, plan = parent.spec, _plan(parent, config)
    if config.out is not None:
        refuse_existing(config.out, config.overwrite)
    free = None if config.out is None else free_space(config.out)
    return PlannedQuantize(**vars(_counts(plan, remarks(plan, spec))), plan=plan.conversion, disk_free=free)


def _directory(config: QuantizeConfig) -> Path:
    source = preset_or_directory(config.source)
    if not isinstance(source, Path):
        told = "--dry-run tells what its FP8 form would take"
        hint = f"./{config.source} names the directory of that name" if Path(config.source).is_dir() else told
        raise ConfigError("a preset has no weights to quantize", where=config.source, hint=hint)
    if config.out is not None:
        refuse_source(config.out, source)
    return source


def _plan(parent: Parent, config: QuantizeConfig) -> QuantizePlan:
    plan = plan_quantize(parent.spec, parent.sources, config.scheme, decoded=parent.reader.scaled)
    if not plan.tensors_quantized:
        why = "every matrix has a side that is no multiple of 128"
        hint = f"--scheme {Fp8Scheme.CHANNEL} takes any shape"
        raise ConfigError("no matrix of this model can be FP8 by block", where=parent.directory, why=why, hint=hint)
    return plan


def _write(plan: QuantizePlan, parent: Parent, staging: Path, config: QuantizeConfig) -> tuple[TensorError, ...]:
    """Weights, the documents that make them a model, the audit."""
    found: dict[str, TensorError] = {}

    def make(operation: Operation, read: Read) -> tuple[Tensor, ...]:
        if isinstance(operation, Rounded):
            return (_rounded(operation, read(operation.source), parent),)
        if not isinstance(operation, ToFp8):
            return make_common(operation, read)
        matrices = [read(source) for source in operation.matrices]
        results: list[Tensor] = []
        for name, matrix, scale in zip(operation.names, matrices, _scales(operation, matrices, parent), strict=True):
            codes = encode_scaled(matrix, scale, operation.scheme)
            found[name] = audit.measure_matrix(name, matrix, codes, scale, operation.scheme)
            results += [codes, scale]
        return tuple(results)

    replay(plan.conversion, [parent], staging, make, name="quantize", max_shard_bytes=config.max_shard_bytes)
    extra = {FIELD: write_quantization(plan.quantization)}
    write_documents(staging, parent.spec, plan.main_dtype, [parent.directory], extra_config=extra)
    errors = audit.complete(found, plan, parent, staging)
    write_json(staging / audit.AUDIT_NAME, audit.as_json(errors, config.scheme))
    return errors


def _rounded(operation: Rounded, tensor: Tensor, parent: Parent) -> Tensor:
    narrow = tensor.to(torch_dtype(operation.dtype))
    if not all(math.isfinite(bound) for bound in narrow.aminmax()):
        what = f"tensor {operation.source} holds NaN, infinity, or a number too large for {operation.dtype}"
        why = "what is not FP8 is written in the type of the embedding"
        raise FormatError(what, where=parent.directory, why=why)
    return narrow


def _scales(operation: ToFp8, matrices: list[Tensor], parent: Parent) -> list[Tensor]:
    """The scales of the matrices of a step; by tensor, the one that they share."""
    found = []
    for source, matrix in zip(operation.matrices, matrices, strict=True):
        try:
            found.append(scales(largest(matrix, operation.scheme)))
        except ValueError as error:
            raise FormatError(f"tensor {source} holds NaN or infinity", where=parent.directory) from error
    return [max(found)] * len(found) if operation.scheme is Fp8Scheme.TENSOR else found


def _counts(plan: QuantizePlan, told: tuple[str, ...]) -> Counts:
    return Counts(
        scheme=plan.quantization.scheme,
        style=plan.quantization.style.value,
        weight_bytes=plan.weight_bytes,
        weight_bytes_by_kind=plan.bytes_by_kind,
        tensors_quantized=plan.tensors_quantized,
        tensors_kept=plan.tensors_kept,
        unfit=plan.unfit,
        rounded=plan.rounded,
        remarks=told,
    )


def _report(counts: Counts, errors: tuple[TensorError, ...], receipt: Receipt, files: Written) -> QuantizeReport:
    before, after = receipt.reference_loss, receipt.loss
    return QuantizeReport(
        **vars(files),
        **vars(counts),
        mean_rms=audit.mean_rms(errors),
        max_rms=max(error.rms for error in errors),
        worst=audit.worst(errors),
        max_abs_dlogit=receipt.max_abs_dlogit,
        kl=receipt.kl,
        loss_change=None if before is None or after is None else after - before,
    )
