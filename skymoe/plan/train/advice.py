"""When nothing fits: the smallest changes that would make it possible, each one tried out.

What a GPU needs at least is found under 1F1B, which of the schedules keeps least (zbv at times keeps less, and is
looked at where 1F1B cannot run). So the memory and the number of GPUs that are named do; that nothing smaller does is
shown for the memory only, and for 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil, lcm, prod

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.catalogue import find_gpu, gpu_names
from skymoe.plan.train.asked import Asked, read_asked
from skymoe.plan.train.config import MAX_GPUS, PlanTrainConfig
from skymoe.plan.train.least import lean_layouts, least_found, needed_memory
from skymoe.plan.train.search import GB, Refused
from skymoe.plan.train.space import Candidate, candidates, divisions
from skymoe.spec.layout import ScheduleKind

_TRIED = 6
"""Layouts whose least memory is computed to see whether a change makes it possible, the likeliest first."""
_PASSES = 2**14
"""Stages times micro-batches of a step that is named where one is too long to be simulated."""
_WALKED = 16
"""Numbers of GPUs, a node apart, that are tried one by one."""


def no_layout(asked: Asked) -> ConfigError:
    """No legal layout at all: the axes, the batch and the model do not go together."""
    config = asked.config
    hints = [*_enough_sequences(asked), *_working(asked)]
    return ConfigError(
        f"no layout of {config.gpus} GPUs can run a step of {asked.sequences} sequences of {config.model}",
        where="plan train",
        why="stages need layers, ranks need heads, replicas need the micro-batches that a schedule asks for",
        hint=_joined(hints[:3]),
    )


def nothing_runs(asked: Asked, refused: Sequence[Refused]) -> ConfigError:
    """Legal layouts, of which none could be divided: for want of memory, or because the solver takes none of them."""
    untaken = [one for one in refused if one.why == "schedule"]
    if not untaken:
        return _nothing_fits(asked)
    # The layout that shares out most tokens in as many passes as are simulated within seconds.
    tokens = max(_most_sequences(one.candidate) for one in untaken) * asked.sequence_length
    smaller = tokens < asked.sequences * asked.sequence_length
    return ConfigError(
        f"no layout could be divided: {untaken[0].reason}", where="plan train",
        hint=f"--global-batch-tokens {tokens}" if smaller else untaken[0].hint,
    )  # fmt: skip


def _most_sequences(one: Candidate) -> int:
    """Of a step of so many passes; at least one micro-batch for each rank."""
    return max(_PASSES // one.num_stages, one.pp) * one.dp * one.micro_batch


def _nothing_fits(asked: Asked) -> ConfigError:
    """Legal layouts, but none within the memory."""
    hints, why = _working(asked), "weights, gradients and optimizer alone are too large for every layout"
    if (found := least_found(asked)) is not None:
        one, need = found
        # Rounded up, so that the figure does when it is given as it stands.
        size = f"{ceil(need / GB * 10) / 10:.1f}"
        why = (
            f"the least is {size} GB on a GPU, with pp {one.pp} x dp {one.dp} x tp {one.tp}, {one.expert}, "
            f"micro-batch {one.micro_batch}"
        )
        hints += _larger(asked, need, size)
    return ConfigError(
        f"{asked.config.model} does not fit {asked.config.gpus} x {asked.cluster.gpu.title} "
        f"with {asked.memory / GB:.1f} GB each",
        where="plan train",
        why=why,
        hint=_joined(hints),
    )


def _enough_sequences(asked: Asked) -> list[str]:
    """The smallest larger step that some division of the GPUs can share out."""
    config, sequences = asked.config, asked.sequences
    shares = {
        dp * (config.micro_batch or 1) * (pp if config.schedule is ScheduleKind.INTERLEAVED else 1)
        for pp, dp, _ in divisions(config, asked.spec, asked.cluster)
    }
    for number in sorted({-(-sequences // share) * share for share in shares}):
        if candidates(config, asked.spec, asked.cluster, number):
            return [f"--global-batch-tokens {number * asked.sequence_length}"]
    return []


def _larger(asked: Asked, need: float, size: str) -> list[str]:
    """The memory that is needed, as far as there are such GPUs, and the smallest of these that does."""
    config = asked.config
    larger = sorted((find_gpu(name).memory, name) for name in gpu_names() if name != "cpu")
    if need > larger[-1][0]:
        return []
    hints = [f"GPUs with {size} GB of memory (--memory {size})"]
    if config.memory is None and config.profile is None:
        names = [name for memory, name in larger if memory >= 0.95 * need][:_TRIED]
        fitting = (name for name in names if _possible(config.replace(gpu=name)))
        hints += [f"--gpu {name}" for name in islice(fitting, 1)]
    return hints


def _joined(changes: Sequence[str]) -> str:
    return "; or ".join(changes)


def _working(asked: Asked) -> list[str]:
    """Changes with which some layout fits, the smaller ones first; more GPUs when nothing else does."""
    found = [words for words, changed in _changes(asked.config) if _possible(changed)]
    if not found and (gpus := _enough_gpus(asked.config, asked.cluster.gpus_per_node)) is not None:
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
    for name in ("schedule", "expert", "pp", "tp", "dp", "nodes_of"):
        if getattr(config, name) is not None:
            chunks = {"chunks": None} if name == "schedule" else {}
            yield f"without --{name.replace('_', '-')}", config.replace(**{name: None, **chunks})


def _enough_gpus(config: PlanTrainConfig, node: int) -> int | None:
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
