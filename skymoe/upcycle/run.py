"""`skymoe upcycle`: decide, replay the plan one tensor at a time, measure, publish.

The output is made in a hidden directory beside OUT and renamed at the end, receipt included: a run that fails leaves
nothing at OUT, and one that is killed is taken up by the same command.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.files import refuse_existing, resumable_directory
from skymoe.base.log import logger
from skymoe.base.space import free_space
from skymoe.convert.documents import write_documents, write_record
from skymoe.convert.identity import FileHashes, conversion_fingerprint
from skymoe.convert.made import Made, ParentRecord, record_parent
from skymoe.convert.measured import Receipt
from skymoe.convert.parents import Parent, open_parent
from skymoe.convert.receipt import measure
from skymoe.convert.replay import replay
from skymoe.convert.result import written
from skymoe.spec.flops import count_parameters
from skymoe.upcycle.centroids import router_centroids, text_tokens, tokens_hash
from skymoe.upcycle.config import Method, UpcycleConfig
from skymoe.upcycle.make import maker
from skymoe.upcycle.plan import Conversion, plan_conversion
from skymoe.upcycle.result import PlannedUpcycle, UpcycleReport
from skymoe.upcycle.words import other_tokenizers, summary


def run(config: UpcycleConfig) -> UpcycleReport:
    """Upcycle `config.sources` into `config.out`.

    Raises:
        FormatError: a source is missing, broken, hostile or not supported.
        ConfigError: the request cannot be met, or OUT exists.
        MissingExtraError: centroids need the package `tokenizers`.
        MachineError: no space, no permission.
    """
    started = time.monotonic()
    with _open_parents(config) as parents:
        tokens_BT = _text(config, parents[0])
        conversion = _decide(config, parents, tokens_BT)
        for remark in conversion.remarks:
            logger.info("note: %s", remark)
        options = config.told() | {"max_shard_bytes": config.max_shard_bytes}
        fingerprint = conversion_fingerprint(conversion.plan, parents, options)
        with (
            resumable_directory(config.out, fingerprint, overwrite=config.overwrite) as staging,
            FileHashes([parent.directory for parent in parents]) as hashes,
        ):
            centroids = _centroids(config, conversion, parents[0], tokens_BT)
            make = maker(centroids, [parent.directory for parent in parents])
            replay(
                conversion.plan, parents, staging, make, name="upcycle", max_shard_bytes=config.max_shard_bytes
            )  # fmt: skip
            write_documents(staging, conversion.target, conversion.main_dtype, [p.directory for p in parents])
            receipt = _receipt(config, conversion, parents, staging)
            made = _made(config, conversion, _records(parents, hashes), tokens_BT)
            write_record(staging, conversion.target, made, receipt)
    return _report(config, conversion, receipt, time.monotonic() - started)


def dry_run(config: UpcycleConfig) -> PlannedUpcycle:
    """What `run` would do. Nothing is written; a text for centroids is read, but not run through the model.

    Raises:
        FormatError, ConfigError: as `run`.
    """
    with _open_parents(config) as parents:
        conversion = _decide(config, parents, _text(config, parents[0]))
    refuse_existing(config.out, config.overwrite)
    count = count_parameters(conversion.target)
    return PlannedUpcycle(
        out=config.out,
        method=config.method.value,
        source_architecture=conversion.base.architecture.value,
        architecture=conversion.target.architecture.value,
        experts=conversion.blueprint.moe.num_experts,
        top_k=conversion.blueprint.moe.top_k,
        parameters=count.total,
        active_parameters=count.active,
        exact=conversion.promise.exact,
        reason=conversion.promise.reason,
        remarks=conversion.remarks,
        disk_free=free_space(config.out),
        spec=conversion.target,
        plan=conversion.plan,
    )


@contextmanager
def _open_parents(config: UpcycleConfig) -> Iterator[tuple[Parent, ...]]:
    with ExitStack() as stack:
        opened = [open_parent(path, i, decode_to=_decode_to(config)) for i, path in enumerate(config.sources)]
        yield tuple(stack.enter_context(parent) for parent in opened)


def _decode_to(config: UpcycleConfig) -> DType:
    """The type of what an FP8 parent holds in 8 bits."""
    return DType.FLOAT32 if config.dtype is DType.FLOAT32 else DType.BFLOAT16


def _decide(config: UpcycleConfig, parents: Sequence[Parent], tokens_BT: Tensor | None) -> Conversion:
    text = "" if tokens_BT is None else tokens_hash(tokens_BT)
    more = other_tokenizers([parent.directory for parent in parents])
    specs, sources = [parent.spec for parent in parents], [parent.sources for parent in parents]
    return plan_conversion(config, specs, sources, text=text, remarks=more)


def _text(config: UpcycleConfig, base: Parent) -> Tensor | None:
    if config.centroid_text is None:
        return None
    return text_tokens(base.directory, config.centroid_text, config.centroid_tokens, base.spec.vocab_size)


def _centroids(
    config: UpcycleConfig, conversion: Conversion, base: Parent, tokens_BT: Tensor | None
) -> dict[int, Tensor]:
    if tokens_BT is None:
        return {}
    layers, clusters = conversion.target.moe_layer_ids, conversion.blueprint.router_rows
    return router_centroids(base.directory, tokens_BT, layers=layers, clusters=clusters, seed=config.seed)


def _receipt(config: UpcycleConfig, conversion: Conversion, parents: Sequence[Parent], staging: Path) -> Receipt:
    return measure(
        config.sources[0],
        staging,
        conversion.promise,
        num_tokens=config.receipt_tokens,
        seed=config.seed,
        narrowed=conversion.rounds or (bool(parents[0].reader.scaled) and _decode_to(config) is DType.BFLOAT16),
    )


def _records(parents: Sequence[Parent], hashes: FileHashes) -> tuple[ParentRecord, ...]:
    return tuple(record_parent(parent, found) for parent, found in zip(parents, hashes.result(), strict=True))


def _made(
    config: UpcycleConfig, conversion: Conversion, records: tuple[ParentRecord, ...], tokens_BT: Tensor | None
) -> Made:
    moe = conversion.blueprint.moe
    decided = {"experts": moe.num_experts, "top_k": moe.top_k, "gate_norm": moe.gate_norm is not None}
    text = {} if tokens_BT is None else {"centroid_tokens_sha256": tokens_hash(tokens_BT)}
    return Made(
        command="upcycle",
        method=config.method.value,
        parents=records,
        summary=summary(config, conversion),
        options=dict(sorted((config.told() | decided | text).items())),
        seed=config.seed,
        remarks=conversion.remarks,
        new_routers=config.method is not Method.DUPLICATE and config.centroid_text is None,
    )


def _report(config: UpcycleConfig, conversion: Conversion, receipt: Receipt, seconds: float) -> UpcycleReport:
    count, moe = count_parameters(conversion.target), conversion.blueprint.moe
    return UpcycleReport(
        **asdict(written(config.out, seconds)),
        method=config.method.value,
        source_architecture=conversion.base.architecture.value,
        architecture=conversion.target.architecture.value,
        experts=moe.num_experts,
        top_k=moe.top_k,
        gate_norm=moe.gate_norm is not None,
        parameters=count.total,
        active_parameters=count.active,
        max_abs_dlogit=receipt.max_abs_dlogit,
        kl=receipt.kl,
        exact=receipt.exact,
        reason=receipt.reason,
        remarks=conversion.remarks,
        receipt=receipt,
    )
