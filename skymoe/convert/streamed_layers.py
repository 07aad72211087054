"""The leaves of the model, reading their weights when an activation meets them. fp32.

`stream_block` takes one layer of `skymoe.model` and exchanges its linear maps and its experts; norms, routers and
biases are small and are read at once. The layer's own forward stays the only one there is.

Shapes: T tokens, D model, F inner width, E experts, R rows grouped by expert; N rows of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skymoe.convert.parents import Parent
from skymoe.convert.plan import Source
from skymoe.convert.replay import read_source
from skymoe.model.block import Block
from skymoe.model.linear import Linear
from skymoe.model.moe import Experts
from skymoe.ops.experts import swiglu

BLOCK_BYTES = 16 * 2**20  # of fp32 weights that are multiplied at once
_ROW_MULTIPLE = 128  # FP8 files have one scale per 128 rows


class Weights:
    """The weights of one model by module name, read when asked for.

    Attributes:
        parent: the model, open.
        plain: module name to source, for everything that is no expert.
        experts: module name and expert to the sources that are stacked by rows (gate and up).
        reached: the experts that were asked for, by module name and number.
    """

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self.plain = parent.by_parameter()
        self.experts: dict[tuple[str, int], tuple[Source, ...]] = {}
        for place, source in parent.sources.items():
            if place.expert is not None:
                key = place.parameter, place.expert
                self.experts[key] = (*self.experts.get(key, ()), source)
        self.reached: set[tuple[str, int]] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, as they are given out."""
        return sum(source.num_bytes for source in self.parent.sources.values())

    def read(self, source: Source) -> Tensor:
        """All of `source`, in fp32."""
        return read_source([self.parent], source).float()

    def rows(self, source: Source) -> Iterator[tuple[range, Tensor]]:
        """`source` (N, D) in blocks of at most about `BLOCK_BYTES`: which rows, and their values in fp32.

        An expert out of a stacked tensor comes in one piece: the files have no shorter way to its rows.
        """
        num_rows, width = source.shape
        step = max(BLOCK_BYTES // (4 * width) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
        if source.is_one_of_a_stack or num_rows <= step:
            yield range(num_rows), self.read(source)
            return
        for first in range(0, num_rows, step):
            part = range(first, min(first + step, num_rows))
            yield part, self.read(replace(source, parts=(part,)))

    def linear(self, x: Tensor, source: Source, bias: Source | None = None) -> Tensor:
        """x W^T (+ b), some rows of W at a time."""
        out = x.new_empty(*x.shape[:-1], source.shape[0])
        for part, weight_ND in self.rows(source):
            out[..., part.start : part.stop] = F.linear(x, weight_ND)
        return out if bias is None else out.add_(self.read(bias))


class StreamedLinear(nn.Module):
    """`model.linear.Linear` without a weight of its own."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weights = weights
        self.weight, self.bias = weights.plain[f"{name}.weight"], weights.plain.get(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.linear(x, self.weight, self.bias)


class StreamedExperts(nn.Module):
    """`model.moe.Experts` that reads an expert when tokens arrive for it, and no other."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weights, self.name = weights, name

    def forward(self, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        y_RD = torch.empty_like(x_RD)
        ends = offsets_E.tolist()
        for expert, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > first:
                y_RD[first:end] = self._expert(x_RD[first:end], expert)
        return y_RD

    def _expert(self, x_RD: Tensor, expert: int) -> Tensor:
        self.weights.reached.add((self.name, expert))
        gate_up = self.weights.experts[f"{self.name}.gate_up", expert]
        (down,) = self.weights.experts[f"{self.name}.down", expert]
        h_RG = torch.cat([self.weights.linear(x_RD, source) for source in gate_up], dim=-1)
        return self.weights.linear(swiglu(h_RG), down)


def stream_block(block: Block, weights: Weights, prefix: str) -> None:
    """Exchange the large leaves of `block`, which is on the meta device, and read the small ones.

    Args:
        block: the layer.
        weights: where its weights are.
        prefix: its module name, with a dot at the end.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, Linear):
            block.set_submodule(name, StreamedLinear(weights, prefix + name))
        elif isinstance(module, Experts):
            block.set_submodule(name, StreamedExperts(weights, prefix + name))
    small: Mapping[str, Tensor] = {name: weights.read(weights.plain[prefix + name]) for name in block.state_dict()}
    block.load_state_dict(small, strict=True, assign=True)
