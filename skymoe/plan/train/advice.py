"""When nothing fits: the smallest changes that would make it possible, each one tried out.

What a GPU needs at least is found under 1F1B, which of the schedules keeps least (zbv at times keeps less, and is
looked at where 1F1B cannot run). So the memory and the number of GPUs that are named do; that nothing smaller does is
shown for the memory only, and for 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, lcm, prod

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.train.asked import Asked, read_asked
from skymoe.plan.train.config import MAX_GPUS, PlanTrainConfig
from skymoe.plan.train.least import lean_layouts, least_found, needed_memory
from skymoe.plan.train.search import GB

_TRIED = 6
"""Layouts whose least memory is computed to see whether a change makes it possible, the likeliest first."""
_WALKED = 16
"""Numbers of GPUs, a node apart, that are tried one by one."""


def no_layout(asked: Asked) -> ConfigError:
    """No legal layout at all: the axes, the batch and the model do not go together."""
    config = asked.config
    return ConfigError(
        f"no layout of {config.gpus} GPUs can run a step of {asked.sequences} sequences of {config.model}",
        where="plan train",
        why="stages need layers, ranks need heads, replicas need the micro-batches that a schedule asks for",
        hint=_joined(_working(config)) or "more sequences in a step (--global-batch-tokens), or fewer GPUs",
    )


def nothing_fits(asked: Asked) -> ConfigError:
    """Legal layouts, but none within the memory."""
    hints, why = _working(asked.config), "weights, gradients and optimizer alone are too large for every layout"
    if (found := least_found(asked)) is not None:
        one, need = found
        # Rounded up, so that the figure does when it is given as it stands.
        size = f"{ceil(need / GB * 10) / 10:.1f}"
        why = (
            f"the least is {size} GB on a GPU, with pp {one.pp} x dp {one.dp} x tp {one.tp}, {one.expert}, "
            f"micro-batch {one.micro_batch}"
        )
        hints.append(f"GPUs with {size} GB of memory (--memory {size})")
    return ConfigError(
        f"{asked.config.model} does not fit {asked.config.gpus} x {asked.cluster.gpu.title} "
        f"with {asked.memory / GB:.1f} GB each",
        where="plan train",
        why=why,
        hint=_joined(hints),
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
    """The smallest number found with which something fits: doubled until it does, halved, then node by node."""

    def fits(count: int) -> bool:
        return _possible(config.replace(gpus=count))

    low, high = config.gpus, 2 * config.gpus
    most = min(MAX_GPUS, 1024 * config.gpus)
    while high <= most and not fits(high):
        low, high = high, 2 * high
    if high > most:
        return None
    ranks = prod(size for size in (config.pp, config.tp, config.dp) if size is not None)
    node = cluster_of(config.gpu, config.gpus, config.nodes_of).gpus_per_node
    step = lcm(ranks, node)
    while high - low > _WALKED * step:
        middle = (low + high) // 2 // step * step
        low, high = (low, middle) if fits(middle) else (middle, high)
    within = range((low // ranks + 1) * ranks, min(high, node), ranks)
    nodes = range((low // step + 1) * step, high, step)
    return next((count for count in (*within, *nodes) if fits(count)), high)


def _possible(config: PlanTrainConfig) -> bool:
    """Whether some layout fits; of those that may, the likeliest are looked at."""
    try:
        asked = read_asked(config)
    except ConfigError:
        return False
    likely = sorted((one for one in lean_layouts(asked) if one.bound <= asked.memory), key=lambda one: one.likely)
    return any(needed_memory(asked, one.candidate) <= asked.memory for one in likely[:_TRIED])
