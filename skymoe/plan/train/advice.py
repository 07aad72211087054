"""When nothing fits: the smallest changes that would make it possible, each one tried out.

A change counts when with it some layout fits, with the layers divided evenly; an exact division may manage with a
little less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.pipeline.solve import uniform
from skymoe.plan.train.asked import Asked, read_asked
from skymoe.plan.train.config import MAX_GPUS, PlanTrainConfig
from skymoe.plan.train.priced import price_all
from skymoe.plan.train.search import GB, Refused
from skymoe.plan.train.space import Candidate, candidates
from skymoe.spec.layout import ScheduleKind

_TRIED = 64


def no_layout(asked: Asked) -> ConfigError:
    """No legal layout at all: the axes, the batch and the model do not go together."""
    config = asked.config
    return ConfigError(
        f"no layout of {config.gpus} GPUs can run a step of {asked.sequences} sequences of {config.model}",
        where="plan train",
        why="stages need layers, ranks need heads, replicas need the micro-batches that a schedule asks for",
        hint=_joined(_working(config)) or "more sequences in a step (--global-batch-tokens), or fewer GPUs",
    )


def nothing_fits(asked: Asked, refused: Sequence[Refused]) -> ConfigError:
    """Legal layouts, but none within the memory."""
    least = min(refused, key=lambda one: one.need)
    need = ceil(least.need / GB * 10) / 10
    one = least.candidate
    return ConfigError(
        f"{asked.config.model} does not fit {asked.config.gpus} x {asked.cluster.gpu.title} "
        f"with {asked.memory / GB:.1f} GB each",
        where="plan train",
        why=f"the least is {need:g} GB on a GPU, with pp {one.pp} x dp {one.dp} x tp {one.tp}, {one.expert}, "
        f"micro-batch {one.micro_batch}",
        hint=_joined([*_working(asked.config), f"{need:g} GB of memory per GPU"]),
    )


def _joined(changes: Sequence[str]) -> str:
    return "; or ".join(changes)


def _working(config: PlanTrainConfig) -> list[str]:
    """Changes with which some layout fits, the smaller ones first; more GPUs when nothing else does."""
    found = [words for words, changed in _changes(config) if _possible(changed)]
    if not found and (gpus := _enough_gpus(config)) is not None:
        found.append(f"--gpus {gpus}")
    return found[:3]


def _changes(config: PlanTrainConfig) -> Iterator[tuple[str, PlanTrainConfig]]:
    """Single options taken back."""
    if config.recompute != "auto":
        yield "--recompute auto", config.replace(recompute="auto")
    if config.micro_batch is not None and config.micro_batch > 1:
        yield "--micro-batch 1", config.replace(micro_batch=1)
    if config.whole_layers:
        yield "without --whole-layers", config.replace(whole_layers=False)
    for name in ("schedule", "expert", "pp", "tp", "dp"):
        if getattr(config, name) is not None:
            chunks = {"chunks": None} if name == "schedule" else {}
            yield f"without --{name}", config.replace(**{name: None, **chunks})


def _enough_gpus(config: PlanTrainConfig) -> int | None:
    """The smallest number found with which something fits: doubled until it does, then halved in between."""

    def fits(count: int) -> bool:
        return _possible(config.replace(gpus=count))

    node = cluster_of(config.gpu, config.gpus, config.nodes_of).gpus_per_node
    low, high = config.gpus, 2 * config.gpus
    while high <= min(MAX_GPUS, 1024 * config.gpus) and not fits(high):
        low, high = high, 2 * high
    if high > min(MAX_GPUS, 1024 * config.gpus):
        return None
    step = max(1, (high - low) // 8)
    step = -(-step // node) * node if low >= node else step
    return next((count for count in range(low + step, high, step) if fits(count)), high)


def _possible(config: PlanTrainConfig) -> bool:
    """Whether some layout fits."""
    try:
        asked = read_asked(config)
    except ConfigError:
        return False
    legal = [one for one in candidates(config, asked.spec, asked.cluster, asked.sequences) if _is_least(one)]
    for priced in sorted(price_all(asked, legal), key=lambda one: one.static_share)[:_TRIED]:
        memory = priced.problem.memory or 0.0
        if priced.static_share <= memory and max(uniform(priced.problem).memory) <= memory:
            return True
    return False


def _is_least(candidate: Candidate) -> bool:
    """Of the schedules, 1F1B keeps least, but for zbv at times; where it cannot run, the others are tried."""
    return candidate.schedule is ScheduleKind.ONE_F_ONE_B or candidate.num_micro < candidate.pp
