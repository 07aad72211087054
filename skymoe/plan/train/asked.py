"""What is asked, in full: model, machine, batch; and what of it is impossible at first sight, and what would do.

The smallest change is computed, not guessed: the nearest number of GPUs, of ranks, of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from skymoe.base.errors import ConfigError, printable
from skymoe.plan.hardware.catalogue import cluster_of, find_gpu
from skymoe.plan.hardware.fitted import gpu_from_profile, measured_on
from skymoe.plan.hardware.gpu import Cluster, Precision
from skymoe.plan.hardware.profile import Profile, read_profile
from skymoe.plan.shape import ModelShape, shape_of
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.model import MOST_SEQUENCE
from skymoe.plan.train.space import divisors, tp_fits, units_of, usual_sequences
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.spec.named import read_model

USUAL_GPU = "a800-80g"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question in full.

    Attributes:
        config: as it was asked.
        spec, shape: the model.
        cluster: the machine.
        sequence_length: tokens.
        sequences: of a step.
        precision: of the matrix products.
        memory: bytes of a GPU that may be used.
        profile: what was measured, or None.
        assumed: what nobody said, in words.
    """

    config: PlanTrainConfig
    spec: ModelSpec
    shape: ModelShape
    cluster: Cluster
    sequence_length: int
    sequences: int
    precision: Precision
    memory: float
    profile: Profile | None
    assumed: tuple[str, ...]


def read_asked(config: PlanTrainConfig) -> Asked:
    """Fill in what was not said.

    Raises:
        ConfigError, FormatError: no such model or GPU, or axes that cannot be.
    """
    spec = read_model(config.model)
    profile = None if config.profile is None else read_profile(config.profile)
    cluster = cluster_of(_gpu(config, profile), config.gpus, config.nodes_of)
    if profile is not None:
        cluster = replace(cluster, gpu=gpu_from_profile(profile, base=cluster.gpu))
    length = config.seq or min(spec.max_position, MOST_SEQUENCE)
    sequences = _sequences(config, length)
    has_bf16 = Precision.BF16 in cluster.gpu.peak
    asked = Asked(
        config=config,
        spec=spec,
        shape=shape_of(spec, Path(config.model).name),
        cluster=cluster,
        sequence_length=length,
        sequences=sequences,
        precision=config.precision or (Precision.BF16 if has_bf16 else Precision.FP32),
        memory=cluster.gpu.memory if config.memory is None else config.memory * 1e9,
        profile=profile,
        assumed=tuple(_assumed(config, length, sequences)),
    )
    _check_pipeline(config, spec)  # first: its change is of one axis, and the ranks are then looked at with it
    _check_ranks(config, spec, cluster)
    _check_experts(config, spec)
    _check_batch(config, sequences)
    return asked


def _gpu(config: PlanTrainConfig, profile: Profile | None) -> str:
    """The name that was given, which a profile must be of; else the profile's, or the usual one."""
    if profile is None:
        return config.gpu or USUAL_GPU
    measured = measured_on(profile)
    if config.gpu is None:
        return measured or USUAL_GPU
    named = find_gpu(config.gpu).name
    if measured not in (None, named) or (measured is None and named == "cpu"):
        title = printable(profile.machine.title or profile.machine.device, 100)
        raise ConfigError(
            f"{config.profile} was measured on {title}, which is no {named}", where="--profile",
            why="its figures replace those of the GPU that is planned for",
            hint=f"--gpu {measured}, or leave --profile out" if measured else "leave --gpu out",
        )  # fmt: skip
    return named


def _sequences(config: PlanTrainConfig, length: int) -> int:
    if config.global_batch_tokens is None:
        return usual_sequences(config.gpus)
    sequences, rest = divmod(config.global_batch_tokens, length)
    if rest or not sequences:
        known = config.dp is not None or (config.pp is not None and config.tp is not None)
        replicas = config.dp or max(1, config.gpus // ((config.pp or 1) * (config.tp or 1))) if known else 1
        share = length * replicas * (config.micro_batch or 1)
        near = max(1, round(config.global_batch_tokens / share)) * share
        raise ConfigError(
            f"{config.global_batch_tokens} tokens are not whole sequences of {length}",
            where="--global-batch-tokens", hint=f"--global-batch-tokens {near}",
        )  # fmt: skip
    return sequences


def _assumed(config: PlanTrainConfig, length: int, sequences: int) -> list[str]:
    told = []
    if config.seq is None:
        told.append(f"sequences of {length} tokens (--seq)")
    if config.global_batch_tokens is None:
        told.append(f"a step of {sequences} sequences, {sequences * length} tokens (--global-batch-tokens)")
    if config.imbalance == 1.0 and config.capacity is None:
        told.append("experts equally loaded, no token dropped (--imbalance, --capacity)")
    return told


def _check_ranks(config: PlanTrainConfig, spec: ModelSpec, cluster: Cluster) -> None:
    """The axes given must divide the GPUs, and heads must go round."""
    given = {name: size for name in ("pp", "tp", "dp") if (size := getattr(config, name)) is not None}
    product = math.prod(given.values())
    whole = len(given) == 3
    if config.gpus % product or (whole and product != config.gpus):
        flags = " x ".join(f"{name} {size}" for name, size in given.items())
        multiple = product if whole else max(1, round(config.gpus / product)) * product
        others = [f"--gpus {multiple}"]
        if len(given) == 1:
            name, size = next(iter(given.items()))
            others.append(f"--{name} {min(divisors(config.gpus), key=lambda d: (abs(d - size), d))}")
        raise ConfigError(
            f"{flags} does not divide {config.gpus} GPUs" if not whole else f"{flags} is not {config.gpus} GPUs",
            where="--gpus", hint=" or ".join(others),
        )  # fmt: skip
    if config.tp is not None and config.tp > spec.num_kv_heads:
        raise ConfigError(
            f"tp {config.tp} is more than the {spec.num_kv_heads} key/value heads",
            where="--tp", why="a head is not cut",
            hint=f"--tp {max(d for d in divisors(config.gpus) if tp_fits(d, spec, cluster))}",
        )  # fmt: skip
    per_node = cluster.gpus_per_node
    if config.tp is not None and per_node % config.tp and not config.tp <= config.gpus <= per_node:
        near = max(d for d in divisors(per_node) if d <= config.tp)
        nodes = max(1, round(per_node / config.tp)) * config.tp
        raise ConfigError(
            f"tensor-parallel groups of {config.tp} do not stay within nodes of {per_node}",
            where="--tp", why="every layer waits for its collectives", hint=f"--tp {near}, or --nodes-of {nodes}",
        )  # fmt: skip


def _check_pipeline(config: PlanTrainConfig, spec: ModelSpec) -> None:
    """Every stage needs something to do."""
    if config.pp is None or config.pp == 1:
        return
    units = units_of(config, spec)
    per_rank = {ScheduleKind.ZERO_BUBBLE: 2, ScheduleKind.INTERLEAVED: config.chunks or 2}.get(
        config.schedule or ScheduleKind.ONE_F_ONE_B, 1
    )
    if config.pp * per_rank <= units:
        return
    what = "layers" if config.whole_layers else "layers, that is, of twice as many halves"
    others = (config.tp or 1) * (config.dp or 1)
    left = config.gpus // others if config.gpus % others == 0 else config.gpus
    hints = [f"--pp {max(d for d in divisors(left) if d <= max(1, units // per_rank))}"]
    if config.whole_layers and config.pp * per_rank <= 2 * spec.num_layers:
        hints.append("stages that end within a layer (without --whole-layers)")
    raise ConfigError(
        f"{config.pp * per_rank} stages for a model of {spec.num_layers} {what}",
        where="--pp", why="every stage needs one", hint=", or ".join(hints),
    )  # fmt: skip


def _check_experts(config: PlanTrainConfig, spec: ModelSpec) -> None:
    if spec.moe is None:
        for name in ("expert", "capacity"):
            if getattr(config, name) is not None:
                raise ConfigError("the model has no experts", where=f"--{name}", hint=f"leave --{name} out")


def _check_batch(config: PlanTrainConfig, sequences: int) -> None:
    """Every replica takes the same number of micro-batches."""
    replicas = config.dp
    if replicas is None and config.pp is not None and config.tp is not None:
        replicas = config.gpus // (config.pp * config.tp)
    share = (replicas or 1) * (config.micro_batch or 1)
    if sequences % share == 0:
        return
    near = max(1, round(sequences / share)) * share
    length = (config.global_batch_tokens or 0) // sequences
    raise ConfigError(
        f"{sequences} sequences of a step do not divide over {replicas or 1} replicas in micro-batches of "
        f"{config.micro_batch or 1}",
        where="--global-batch-tokens", why="every replica takes the same number",
        hint=f"a step of {near} sequences" + (f", {near * length} tokens" if length else ""),
    )  # fmt: skip
