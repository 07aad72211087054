"""`skymoe upcycle`: plan, replay the plan one tensor at a time, measure, publish.

The output is written under a hidden name beside OUT and renamed at the end, receipt included: a run that fails or is
killed leaves nothing at OUT.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymoe.base.config import Config
from skymoe.base.dtype import DType
from skymoe.base.files import staging_directory
from skymoe.base.log import logger
from skymoe.base.progress import progress
from skymoe.convert.receipt import Receipt, measure
from skymoe.model.init import initial_tensor
from skymoe.model.load import check_spare_head
from skymoe.model.save import write_documents, write_json
from skymoe.spec.flops import count_parameters
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import ModelSpec
from skymoe.upcycle.config import UpcycleConfig
from skymoe.upcycle.plan import Operation, Step, UpcyclePlan, plan_copy
from skymoe.upcycle.target import exactness, target_spec
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.match import match_tensors
from skymoe.weights.reader import WeightsReader
from skymoe.weights.writer import ShardedWriter

RECEIPT_NAME = "receipt.json"


@dataclass(frozen=True)
class UpcycleReport:
    """What the conversion did.

    Attributes:
        out: the new model directory.
        method: how the experts were made.
        source_architecture, architecture: on disk, before and after.
        experts, top_k: of the new model.
        gate_norm: whether the gate is normalized.
        parameters, active_parameters: of the new model; the second is what one token uses.
        max_abs_dlogit, kl, exact, reason: the receipt, see `Receipt`; receipt.json has all of it.
        bytes_written: of the weights.
        seconds: in all.
        remarks: what the user should know.
    """

    out: Path
    method: str
    source_architecture: str
    architecture: str
    experts: int
    top_k: int
    gate_norm: bool
    parameters: int
    active_parameters: int
    max_abs_dlogit: float | None
    kl: float | None
    exact: bool
    reason: str
    bytes_written: int
    seconds: float
    remarks: tuple[str, ...]


def run(config: UpcycleConfig) -> UpcycleReport:
    """Upcycle `config.source` into `config.out`.

    Raises:
        FormatError: the source is missing, broken, hostile or not supported.
        ConfigError: it is not dense, cannot be upcycled as asked, or OUT exists.
        MachineError: no space, no permission.
    """
    started = time.monotonic()
    dense = spec_from_directory(config.source)
    target, remarks = target_spec(dense, config)
    for remark in remarks:
        logger.info("note: %s", remark)
    with staging_directory(config.out, overwrite=config.overwrite) as staging:
        with WeightsReader(config.source) as reader:
            match = match_tensors(dense, reader.names(), where=config.source)
            check_spare_head(reader, match)
            plan = plan_copy(dense, target, reader.names(), config.dtype)
            logger.debug("%s", plan)
            replay(plan, reader, staging, config)
            narrowed = _main_dtype(plan).itemsize < reader.names()["model.embed_tokens.weight"].dtype.itemsize
        write_documents(staging, target, _main_dtype(plan), source=config.source, provenance=_provenance(config, dense))
        receipt = _receipt(config, target, staging, narrowed=narrowed)
        write_json(staging / RECEIPT_NAME, asdict(receipt))
    return _report(config, plan, receipt, remarks, time.monotonic() - started)


@torch.no_grad()
def replay(plan: UpcyclePlan, reader: WeightsReader, directory: Path, config: UpcycleConfig) -> None:
    """Do every step of `plan`: read (or make) one tensor, write it to all its targets, forget it."""
    writer = ShardedWriter(directory, plan.tensors, max_shard_bytes=config.max_shard_bytes)
    with writer, progress("upcycle", plan.bytes_written / 1e6, "MB") as bar:
        for step in plan.steps:
            tensor = _make(step, reader, plan.target, config)
            for target in step.targets:
                writer.add(target, tensor)
                bar.advance(step.num_bytes / 1e6)


def _make(step: Step, reader: WeightsReader, target: ModelSpec, config: UpcycleConfig) -> Tensor:
    dtype = torch_dtype(step.dtype)
    match step.operation:
        case Operation.COPY:
            return reader.tensor(step.source).to(dtype)
        case Operation.ZEROS:
            return torch.zeros(step.shape, dtype=dtype)
        case Operation.NORMAL:
            std = config.router_std if ".router." in step.parameter else target.init_std
            spec = replace(target, init_std=std)
            return initial_tensor(spec, step.parameter, step.shape, config.seed).to(dtype)


def _receipt(config: UpcycleConfig, target: ModelSpec, staging: Path, *, narrowed: bool) -> Receipt:
    assert target.moe is not None
    expected = exactness(target.moe, config.method)
    return measure(
        config.source, staging, expected, num_tokens=config.receipt_tokens, seed=config.seed, narrowed=narrowed
    )


def _main_dtype(plan: UpcyclePlan) -> DType:
    return next(dtype for name, dtype, _ in plan.tensors if name == "model.embed_tokens.weight")


def _provenance(config: Config, dense: ModelSpec) -> dict[str, Any]:
    options = config.model_dump(mode="json", exclude={"source", "out", "overwrite", "max_shard_bytes"})
    source = {"architecture": dense.architecture.value, "parameters": count_parameters(dense).total}
    return {"made_by": "upcycle", "parent": source, "options": options}


def _report(
    config: UpcycleConfig, plan: UpcyclePlan, receipt: Receipt, remarks: tuple[str, ...], seconds: float
) -> UpcycleReport:
    count = count_parameters(plan.target)
    return UpcycleReport(
        out=config.out,
        method=config.method.value,
        source_architecture=plan.dense.architecture.value,
        architecture=plan.target.architecture.value,
        experts=config.experts,
        top_k=config.top_k,
        gate_norm=config.gate_norm,
        parameters=count.total,
        active_parameters=count.active,
        max_abs_dlogit=receipt.max_abs_dlogit,
        kl=receipt.kl,
        exact=receipt.exact,
        reason=receipt.reason,
        bytes_written=plan.bytes_written,
        seconds=round(seconds, 3),
        remarks=remarks,
    )
