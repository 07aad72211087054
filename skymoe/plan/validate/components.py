"""Single operations that others timed: matrix products, and the fitted lines of collectives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from skymoe.plan.cost.collectives import Group
from skymoe.plan.cost.laws import Kernels
from skymoe.plan.cost.model import prices
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.hardware.gpu import Cluster, Precision
from skymoe.plan.memory.model import sizes
from skymoe.plan.validate.cases import Case, NotJudgedError
from skymoe.plan.validate.levels import case_precision
from skymoe.plan.validate.machines import case_cluster, case_gpu
from skymoe.plan.validate.models import case_model
from skymoe.plan.validate.result import Comparison
from skymoe.plan.work import Division, Recompute, Work

_AT_BYTES = 64 * 2**20  # where a collective's line is compared

_LAYER_ROWS: Mapping[str, tuple[Recompute, bool, bool]] = {
    # row of Korthikanti et al. 2022, table 4: level, sequence parallel, layer run again whole
    "baseline_no_recompute": (Recompute.NONE, False, False),
    "sequence_parallel": (Recompute.NONE, True, False),
    "baseline_full_recompute": (Recompute.NONE, False, True),
    "selective": (Recompute.SELECTIVE, False, False),
    "selective_plus_sp": (Recompute.SELECTIVE, True, False),
}


def compare_component(case: Case) -> tuple[Comparison, ...]:
    """A matrix product, a collective, or a layer. Raises NotJudgedError."""
    if all(case.has(f"measured.{key}") for key in ("M", "K", "N", "time_us")):
        return (_product(case),)
    if case.has("measured.fit_busbw_GBps"):
        return (_collective(case),)
    if case.has("measured.layer_ms"):
        return tuple(_layers(case))
    if case.has("measured.dispatch_bottleneck_GBps"):
        raise NotJudgedError("bandwidth of one expert exchange on chosen SMs: data, not a prediction")
    raise NotJudgedError("no such component is predicted")


def _product(case: Case) -> Comparison:
    m, k, n = (case.number(f"measured.{key}", low=1, high=1e8) for key in ("M", "K", "N"))
    precision = case_precision(case)
    laws = Kernels.of(case_gpu(case), precision)
    quantity = "gemm_large" if m >= 1024 else "gemm_small"
    return _comparison(case, quantity, "us", laws.gemm(m, k, n) * 1e6, case.number("measured.time_us", low=1e-3))


def _collective(case: Case) -> Comparison:
    """A collective within a node, at 64 MiB: the law of the price list, not a copy of it."""
    found = re.search(r"(all_reduce|all_gather|reduce_scatter|send_recv)-(\d+|two-nodes|one-node|same-node)", case.id)
    if found is None or "pairwise" in case.id:
        raise NotJudgedError("links of another kind than the catalogue's GPU has")
    gpu = case_gpu(case)
    measured_alpha = case.number("measured.fit_alpha_us", 0.0, high=1e6) * 1e-6
    bandwidth = case.number("measured.fit_busbw_GBps", low=1e-3, high=1e5) * 1e9
    if found[1] == "send_recv":
        raise NotJudgedError("one pair of GPUs that has all network cards for itself, or a single one")
    ranks = int(found[2]) if found[2].isdigit() else 0
    if not 2 <= ranks <= gpu.gpus_per_node:
        raise NotJudgedError("a group that is not within one node")
    group = Group(Cluster(gpu=gpu, num_gpus=ranks, gpus_per_node=gpu.gpus_per_node), ranks)
    is_sum = found[1] == "all_reduce"
    predicted = group.all_reduce(_AT_BYTES) if is_sum else group.all_gather(_AT_BYTES)
    factor = (2.0 if is_sum else 1.0) * (ranks - 1) / ranks
    measured = measured_alpha + factor * _AT_BYTES / bandwidth
    return _comparison(case, "collective", "us", predicted * 1e6, measured * 1e6)


def _layers(case: Case) -> Iterator[Comparison]:
    """Forward and backward of one layer in several settings."""
    rows: Any = case.get("measured.layer_ms")
    tp = case.count("parallel.tp", high=1024)
    for name, (level, sequence_parallel, again) in _LAYER_ROWS.items():
        if not (isinstance(rows, dict) and isinstance(rows.get(name), dict)):
            continue
        total = case.number(f"measured.layer_ms.{name}.total", low=1e-6, high=1e6)
        division = Division(pp=1, dp=1, tp=tp, sequence_parallel=sequence_parallel)
        work = Work(
            shape=case_model(case).shape, division=division, cluster=case_cluster(case),
            sequence_length=case.count("batch.seq_len"), micro_batch=case.count("batch.micro_batch_size"),
            num_micro=1, precision=Precision.BF16, recompute=level, flash=False,
        )  # fmt: skip
        halves = prices(work).halves[:2]
        seconds = sum(half.forward_s + half.backward_s + (half.again_s if again else 0.0) for half in halves)
        yield _comparison(case, "layer", "ms", seconds * 1e3, total)


def compare_relative_memory(case: Case) -> tuple[Comparison, ...]:
    """Activations of a layer as a share of those with tensor parallelism alone (Korthikanti et al. 2022, figure 7)."""
    shares: Any = case.get("measured.rel_activation_pct_vs_tp_baseline")
    if not isinstance(shares, dict):
        raise NotJudgedError("no share of activations")
    settings = {
        "seq_parallel": (Recompute.NONE, True),
        "selective": (Recompute.SELECTIVE, False),
        "seq_plus_selective": (Recompute.SELECTIVE, True),
    }
    baseline = _layer_bytes(case, Recompute.NONE, False)
    path = "measured.rel_activation_pct_vs_tp_baseline"
    return tuple(
        _comparison(
            case, "activations", "%", 100 * _layer_bytes(case, *setting) / baseline,
            case.number(f"{path}.{name}", low=1e-3, high=1e3),
        )
        for name, setting in settings.items()
        if name in shares
    )  # fmt: skip


def _layer_bytes(case: Case, level: Recompute, sequence_parallel: bool) -> float:
    cluster = cluster_of("a100-80g", 8)  # bytes do not depend on it
    tp = case.count("parallel.tp", high=1024)
    work = Work(
        shape=case_model(case).shape, division=Division(pp=1, dp=1, tp=tp, sequence_parallel=sequence_parallel),
        cluster=cluster, sequence_length=case.count("batch.seq_len"), micro_batch=1, num_micro=1, recompute=level,
        flash=False,
    )  # fmt: skip
    return sum(half.activation for half in sizes(work).halves[:2])


def _comparison(case: Case, quantity: str, unit: str, predicted: float, measured: float) -> Comparison:
    return Comparison(
        case=case.id, group=case.group, quantity=quantity, unit=unit, predicted=predicted, measured=measured
    )
