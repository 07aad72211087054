"""How activations cross the tensor-parallel group around a sharded module.

Between modules, hidden states are flat (N = B T tokens of the micro-batch). Attention and feed-forward want all tokens
and give partial sums, because each rank has some of the heads or columns:

    y = leave(module(enter(norm(x))))

    mode R      every rank has all N tokens      enter: identity (backward: sum)     leave: all-reduce
    G and A     each rank has its rows           enter: all-gather of rows           leave: reduce-scatter of rows

Either pair is a linear map and its adjoint, so the gradient of the norm is complete for the tokens a rank has: all of
them in R, its own rows in G and A, where it must then be summed over the group (`Slice.partial`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from skymoe.parallel.collectives import gather_rows, scatter_rows, sum_backward, sum_forward
from skymoe.parallel.mesh import Group, Mesh
from skymoe.spec.split import Split


@dataclass(frozen=True)
class Tokens:
    """The tokens of every micro-batch, and this rank's part.

    Attributes:
        split: of the N tokens over the group; None in mode R, where every rank has all.
        group: the tensor-parallel ranks.
        num_all: N.
    """

    split: Split | None
    group: Group
    num_all: int

    @classmethod
    def of(cls, mesh: Mesh, num_tokens: int) -> Tokens:
        """For micro-batches of `num_tokens` tokens on `mesh`."""
        split = mesh.layout.tokens(num_tokens) if mesh.layout.sequence_parallel else None
        return cls(split, mesh.tp, num_tokens)

    @property
    def rows(self) -> slice:
        """This rank's rows among the N."""
        part = range(self.num_all) if self.split is None else self.split.part(self.group.rank)
        return slice(part.start, part.stop)

    @property
    def num_rows(self) -> int:
        """How many rows this rank has."""
        return self.rows.stop - self.rows.start

    def enter(self, x_ND: Tensor) -> Tensor:
        """This rank's tokens -> all tokens, for a module that has a part of the weights."""
        if self.split is None:
            return sum_backward(x_ND, self.group)
        return gather_rows(x_ND, self.split, self.group)

    def leave(self, y_ND: Tensor) -> Tensor:
        """Partial sums for all tokens -> complete results for this rank's tokens."""
        if self.split is None:
            return sum_forward(y_ND, self.group)
        return scatter_rows(y_ND, self.split, self.group)

    def own(self, values: Tensor | None) -> Tensor | None:
        """This rank's rows of something that every rank knows for all tokens."""
        return None if values is None else values[self.rows]
