"""From prices and sizes to a pipeline that is to be divided: seconds for time, bytes for memory, halves for units."""

from __future__ import annotations

from skymoe.plan.cost.prices import Price, Prices
from skymoe.plan.memory.sizes import Size, Sizes
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.work import Work
from skymoe.spec.layout import ScheduleKind


def problem_of(
    work: Work,
    prices: Prices,
    sizes: Sizes,
    *,
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B,
    chunks: int = 1,
    memory: float | None = None,
    whole_layers: bool = False,
    recompute: bool = True,
) -> Problem:
    """The pipeline of one replica.

    Args:
        work: what is divided over what.
        prices: of `work`, in seconds.
        sizes: of `work`, in bytes.
        schedule, chunks: of the pipeline.
        memory: of a GPU, in bytes; None means that of its type. The reserve is taken off here.
        whole_layers: stages end at layers' ends only.
        recompute: whether layers may be run again.
    """
    available = work.cluster.gpu.memory if memory is None else memory
    halves = zip(prices.halves, sizes.halves, strict=True)
    return Problem(
        units=tuple(_unit(price, size, number // 2) for number, (price, size) in enumerate(halves)),
        num_ranks=work.division.pp,
        num_micro=work.num_micro,
        embedding=_end(prices.embedding, sizes.embedding),
        head=_end(prices.head, sizes.head),
        tied_static=sizes.head.static if work.shape.tied else 0.0,
        memory=available - sizes.reserve,
        hop=prices.hop_s,
        schedule=schedule,
        chunks=chunks,
        recompute=recompute,
        whole_layers=whole_layers,
    )


def _unit(price: Price, size: Size, layer: int) -> Unit:
    return Unit(
        forward=price.forward_s, backward=price.backward_s, weight=price.weight_s, again=price.again_s,
        static=size.static, activation=size.activation, checkpoint=size.checkpoint, transient=size.transient,
        layer=layer,
    )  # fmt: skip


def _end(price: Price, size: Size) -> End:
    return End(
        forward=price.forward_s, backward=price.backward_s, weight=price.weight_s,
        static=size.static, activation=size.activation, transient=size.transient,
    )  # fmt: skip
