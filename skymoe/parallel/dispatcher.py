"""What every distributed dispatcher is: a way there and a way back, each of which pauses where rows are travelling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from skymoe.model.dispatch import Received
from skymoe.ops.routing import Routing
from skymoe.parallel.steps import Steps, run
from skymoe.spec.split import Split

ReceiptT = TypeVar("ReceiptT")


class ShardedDispatcher(ABC, Generic[ReceiptT]):
    """`model.dispatch.TokenDispatcher` over ranks; see parallel/dispatch.py.

    Attributes:
        rows: tokens of each rank among those that this one exchanges tokens with.
        rank: this rank's place among them.
        overlap: whether metadata travels beside other work, and chunks beside one another.
        chunks: into how many parts `routed_experts` cuts the tokens.
    """

    rows: Split
    rank: int
    overlap: bool
    chunks: int

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Received, ReceiptT]:
        """Send each token to its experts."""
        return run(self.dispatch_steps(x_TD, routing, self.rows))

    def combine(self, y_RD: Tensor, receipt: ReceiptT) -> Tensor:
        """Bring the experts' outputs back: (R, D) -> (T, D)."""
        return run(self.combine_steps(y_RD, receipt))

    @abstractmethod
    def dispatch_steps(self, x_TD: Tensor, routing: Routing, rows: Split) -> Steps[tuple[Received, ReceiptT]]:
        """`dispatch` of a part of the tokens, of which each rank has `rows`."""

    @abstractmethod
    def combine_steps(self, y_RD: Tensor, receipt: ReceiptT) -> Steps[Tensor]:
        """`combine`, with a pause while rows travel."""
