"""Bill: seconds of one part of the model, by cause; Frame: what all parts of a work have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from skymoe.plan.cost.collectives import Group, exposed
from skymoe.plan.cost.laws import Kernels, LinearTime
from skymoe.plan.cost.prices import Price
from skymoe.plan.work import Recompute, Work


@dataclass(frozen=True)
class Frame:
    """What one rank works with, whatever the part."""

    work: Work

    @cached_property
    def kernels(self) -> Kernels:
        """The laws of this GPU."""
        gpu, division = self.work.cluster.gpu, self.work.division
        return Kernels.of(gpu, self.work.precision, gradient=division.gradient_bytes)

    @cached_property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.work.shape.hidden_size

    @cached_property
    def tokens(self) -> float:
        """That pass the matrices which are cut over tp."""
        return self.work.tokens

    @cached_property
    def rows(self) -> float:
        """Tokens of norms and residuals: a part of them under sequence parallelism."""
        division = self.work.division
        return self.tokens / division.tp if division.sequence_parallel else self.tokens

    @cached_property
    def tensor(self) -> Group:
        """Tensor-parallel ranks, neighbours."""
        return Group(self.work.cluster, self.work.division.tp)

    @cached_property
    def context(self) -> Group:
        """Context-parallel ranks."""
        return Group(self.work.cluster, self.work.division.cp, self.work.division.tp)

    @cached_property
    def data(self) -> Group:
        """Ranks that hold the same dense weights."""
        division = self.work.division
        return Group(self.work.cluster, division.dp * division.cp, division.tp)

    @cached_property
    def expert_data(self) -> Group:
        """Ranks that hold the same expert weights."""
        division = self.work.division
        stride = max(1, division.stage_ranks // division.expert_dp)
        return Group(self.work.cluster, division.expert_dp, stride)

    @cached_property
    def stream_bytes(self) -> float:
        """Of the residual stream of all tokens: what tensor parallelism moves."""
        return self.tokens * self.hidden * self.kernels.element


@dataclass
class Bill:
    """Seconds by cause. `again` is the part of the forward that the base level of recomputation runs twice."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)
    weight_s: float = 0.0

    def add(self, cause: str, forward_s: float, backward_s: float, *, again: bool = False) -> None:
        """Enter one item; `again`: at the base level its forward is run a second time."""
        self.forward[cause] = self.forward.get(cause, 0.0) + forward_s
        self.backward[cause] = self.backward.get(cause, 0.0) + backward_s
        if again:
            self.again[cause] = self.again.get(cause, 0.0) + forward_s

    def linear(self, time: LinearTime) -> None:
        """Enter a linear layer."""
        self.add("gemm", time.forward, time.backward)
        self.weight_s += time.weights

    def at_least(self, host_s: float) -> None:
        """A pass takes no less than its host needs to start its kernels; what is missing is entered as "host"."""
        self.add(
            "host",
            max(0.0, host_s - sum(self.forward.values())),
            max(0.0, host_s - sum(self.backward.values())),
        )

    def price(self, recompute: Recompute) -> Price:
        """The price, with what the base level runs again in the backward pass."""
        again = self.forward if recompute is Recompute.FULL else self.again
        forward_s, again_s = sum(self.forward.values()), sum(again.values())
        causes = dict.fromkeys([*self.forward, *self.backward])
        return Price(
            forward_s=forward_s,
            backward_s=sum(self.backward.values()) + again_s,
            weight_s=self.weight_s,
            again_s=max(0.0, forward_s - again_s),
            parts={
                cause: self.forward.get(cause, 0.0) + self.backward.get(cause, 0.0) + again.get(cause, 0.0)
                for cause in causes
            },
        )


def tensor_parallel(frame: Frame, bill: Bill, first: LinearTime) -> None:
    """Enter the communication around a column-cut and a row-cut matrix; `first` is the column-cut one.

    Without sequence parallelism: an all-reduce after the second matrix; in the backward pass one of the gradient of
    the first one's input, hidden behind its weight gradient. With it: all-gather before, reduce-scatter after; in the
    backward pass an all-gather of the output's gradient (nothing to hide it), one of the input, which was not kept
    (hidden behind the product towards the input), and a reduce-scatter (hidden behind the weight gradient). This is
    what Megatron-LM does (core/tensor_parallel/layers.py). With `tensor_overlap` the rest is sent in pieces while the
    product beside it runs, too.
    """
    size, group = frame.stream_bytes, frame.tensor
    if group.ranks == 1:
        return
    if not frame.work.division.sequence_parallel:
        reduce = group.all_reduce(size)
        bill.add("tp", reduce, exposed(reduce, first.weights))
        return
    once = group.all_gather(size)
    forward = backward = once
    if frame.work.division.tensor_overlap:
        forward, backward = exposed(once, first.forward), exposed(once, first.inputs)
    bill.add("tp", 2.0 * forward, backward + exposed(once, first.inputs) + exposed(once, first.weights))
