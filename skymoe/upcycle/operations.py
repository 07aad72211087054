"""The operations of this job, as data; `make.py` performs them. No torch.

Everything random is named by a key that begins with the seed and names the layer, the expert and the matrix, so that a
tensor's values depend on nothing else: not on the order of the steps, not on other tensors, not on the machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skymoe.convert.plan import Operation, Source


@dataclass(frozen=True)
class Random(Operation):
    """New rows: (rows, width), each written `repeat` times one after another.

    Attributes:
        rows, width: of what is drawn.
        std: standard deviation.
        key: of the values.
        flat: uniform between +-sqrt(3) std instead of normal.
        repeat: the experts of a virtual group share one row.
    """

    rows: int
    width: int
    std: float
    key: str
    flat: bool = False
    repeat: int = 1

    def __str__(self) -> str:
        kind = "uniform" if self.flat else "normal"
        repeated = f", {self.rows} rows each {self.repeat} times" if self.repeat > 1 else ""
        return f"{kind} std {self.std:g}{repeated}"


@dataclass(frozen=True)
class Centroids(Operation):
    """Router rows from clusters of the hidden states that enter the layer.

    Attributes:
        layer: of the parent.
        rows, width: number of clusters, and the hidden size.
        length: Euclidean length of every row.
        repeat: as in `Random`.
        text: SHA-256 of the tokens whose hidden states are meant.
        key: of the first centroids.
    """

    layer: int
    rows: int
    width: int
    length: float
    repeat: int
    text: str
    key: str

    def __str__(self) -> str:
        repeated = f", each {self.repeat} times" if self.repeat > 1 else ""
        return f"centroids of {self.rows} clusters of hidden states{repeated}"


@dataclass(frozen=True)
class _Neurons(Operation):
    """A change of some neurons of one matrix: its rows (axis 0: gate, up) or columns (axis 1: down)."""

    source: Source
    axis: int
    share: float
    indices_key: str
    values_key: str

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def count(self) -> int:
        """How many neurons are changed; at least one."""
        return max(1, round(self.share * self.source.shape[self.axis]))

    @property
    def working_bytes(self) -> int:
        part = math.prod(self.source.shape) * self.count // self.source.shape[self.axis]
        return part * (4 + 2 * self.source.dtype.itemsize)  # the values in fp32, what they replace, and rounded


@dataclass(frozen=True)
class Redraw(_Neurons):
    """Drop-Upcycling: the chosen neurons become N(mean, deviation) of the part that they replace."""

    def __str__(self) -> str:
        return f"draw {self.count} of {self.source.shape[self.axis]} neurons anew"


@dataclass(frozen=True)
class AddNoise(_Neurons):
    """N(0, (std times the deviation of the whole matrix)^2) on the chosen neurons."""

    std: float = 0.0

    @property
    def working_bytes(self) -> int:
        return super().working_bytes + super().working_bytes // 2

    def __str__(self) -> str:
        return f"noise of {self.std:g} deviations on {self.count} of {self.source.shape[self.axis]} neurons"


@dataclass(frozen=True)
class Shards(Operation):
    """One matrix cut into `count` equal shards of neurons, one result each.

    Attributes:
        source: the matrix.
        axis: 0 where neurons are rows, 1 where they are columns.
        count: of shards.
        scale: factor of all values.
        shuffle_key: neurons are dealt out in the random order of this key; empty: in order.
    """

    source: Source
    axis: int
    count: int
    scale: float = 1.0
    shuffle_key: str = ""

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def working_bytes(self) -> int:
        wide = 0 if self.scale == 1.0 else 4 * math.prod(self.source.shape) // self.count
        return wide + (self.source.num_bytes if self.shuffle_key else 0)

    def __str__(self) -> str:
        order = " in random order" if self.shuffle_key else ""
        scaled = "" if self.scale == 1.0 else f", times {self.scale:g}"
        return f"cut the neurons{order} into {self.count}{scaled}"


@dataclass(frozen=True)
class Average(Operation):
    """The mean of the same tensor of several models, in fp32."""

    of: tuple[Source, ...]

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.of

    @property
    def working_bytes(self) -> int:
        return 8 * math.prod(self.of[0].shape)

    def __str__(self) -> str:
        return f"mean of {len(self.of)} models"


@dataclass(frozen=True)
class CloneRows(Operation):
    """The rows of a router (or of an expert bias) once around, up to `count`; noise on those after the first round.

    Attributes:
        source: (n,) or (n, D).
        count: of rows in the result.
        scale: factor of all values.
        noise: deviation relative to that of the source.
        key: of the noise.
    """

    source: Source
    count: int
    scale: float = 1.0
    noise: float = 0.0
    key: str = ""

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def working_bytes(self) -> int:
        return 8 * self.count * math.prod(self.source.shape[1:])

    def __str__(self) -> str:
        noise = f", noise of {self.noise:g} deviations on the copies" if self.noise else ""
        scaled = "" if self.scale == 1.0 else f", times {self.scale:g}"
        return f"{self.source.shape[0]} rows repeated to {self.count}{scaled}{noise}"
