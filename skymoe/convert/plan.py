"""A conversion as data: which tensors are made of what, decided before a byte is written. No torch.

A step reads its sources once and makes all its targets, so a dense matrix that becomes eight experts is read once.
`replay.py` does the steps in order; a job brings the operations that only it knows (`upcycle` re-initializes neurons,
`quantize` rounds to FP8) and a function that performs them. The plan says in advance what will be read and written and
how much memory that takes, and its fingerprint tells whether an interrupted conversion may be continued.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from skymoe.base.dtype import DType
from skymoe.weights.header import TensorInfo


@dataclass(frozen=True)
class Source:
    """A tensor of a parent model, or a part of it.

    Attributes:
        parent: which parent, counted from 0.
        name: of the tensor, as `DecodedReader` knows it.
        info: dtype and shape of the whole tensor.
        parts: one range per leading dimension; a leading range of length 1 drops that dimension (one expert of a
            fused tensor). Empty: the whole tensor.
    """

    parent: int
    name: str
    info: TensorInfo
    parts: tuple[range, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is read."""
        sizes = (*map(len, self.parts), *self.info.shape[len(self.parts) :])
        return sizes[1:] if self.is_one_of_a_stack else sizes

    @property
    def is_one_of_a_stack(self) -> bool:
        """Whether the first dimension is dropped: one expert out of all of a layer."""
        return bool(self.parts) and len(self.parts[0]) == 1 and len(self.info.shape) == 3

    @property
    def dtype(self) -> DType:
        """Element type of what is read."""
        return self.info.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of what is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        parts = "".join(f"[{part.start}:{part.stop}]" for part in self.parts)
        return f"{self.name}{parts}" if self.parent == 0 else f"#{self.parent}:{self.name}{parts}"


@dataclass(frozen=True)
class Operation:
    """What is done to make the targets of a step. Subclasses are frozen dataclasses whose `str` is a short phrase."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is read, in this order."""
        return ()

    @property
    def working_bytes(self) -> int:
        """Memory needed beyond sources and results."""
        return 0


@dataclass(frozen=True)
class Copy(Operation):
    """The source as it is, times `scale`."""

    source: Source
    scale: float = 1.0

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def working_bytes(self) -> int:
        return 0 if self.scale == 1.0 else 4 * math.prod(self.source.shape)  # scaled in fp32

    def __str__(self) -> str:
        return "copy" if self.scale == 1.0 else f"copy, times {self.scale:g}"


@dataclass(frozen=True)
class Zeros(Operation):
    """All zero."""

    def __str__(self) -> str:
        return "zeros"


@dataclass(frozen=True)
class Target:
    """One output tensor.

    Attributes:
        name: in the output files.
        dtype, shape: as it is written.
        slot: which of the operation's results it is.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    slot: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return TensorInfo(self.dtype, self.shape).num_bytes


@dataclass(frozen=True)
class Step:
    """One operation and everything that is made of its results."""

    operation: Operation
    targets: tuple[Target, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of the sources."""
        return sum(source.num_bytes for source in self.operation.sources)

    @property
    def bytes_written(self) -> int:
        """Bytes of all targets."""
        return sum(target.num_bytes for target in self.targets)

    @property
    def peak_bytes(self) -> int:
        """Memory while the step is done: sources, working space, and each result once."""
        results = {target.slot: target.num_bytes for target in self.targets}
        return self.bytes_read + self.operation.working_bytes + sum(results.values())

    def __str__(self) -> str:
        first, more = self.targets[0], len(self.targets) - 1
        target = f"{first.name} [{'x'.join(map(str, first.shape))} {first.dtype}]"
        sources = ", ".join(map(str, self.operation.sources[:3])) or "-"
        rest = ", ..." if len(self.operation.sources) > 3 else ""
        return f"{sources}{rest} -> {self.operation} -> {target}" + (f" and {more} more" if more else "")


@dataclass(frozen=True)
class ConversionPlan:
    """All steps, and the output's tensors in file order.

    Attributes:
        steps: in the order of their first target, so that shards are finished one after another.
        tensors: every output tensor in file order; each is a target of exactly one step.
    """

    steps: tuple[Step, ...]
    tensors: tuple[Target, ...]

    def __post_init__(self) -> None:
        made = [target.name for step in self.steps for target in step.targets]
        assert len(made) == len(set(made)) == len(self.tensors), "every tensor is made exactly once"

    @property
    def bytes_read(self) -> int:
        """Bytes of all sources."""
        return sum(step.bytes_read for step in self.steps)

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors."""
        return sum(target.num_bytes for target in self.tensors)

    @property
    def peak_bytes(self) -> int:
        """Most memory that any step takes, tensors only."""
        return max(step.peak_bytes for step in self.steps)

    def fingerprint(self) -> str:
        """SHA-256 of the whole plan, in hexadecimal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def lines(self) -> Iterator[str]:
        """One line per output tensor, for `--dry-run`: source -> operation -> target, bytes."""
        for step in self.steps:
            sources = ", ".join(map(str, step.operation.sources)) or "-"
            for target in step.targets:
                shape = "x".join(map(str, target.shape))
                yield f"{sources} -> {step.operation} -> {target.name} [{shape} {target.dtype}] {target.num_bytes}"

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data: totals, and one entry per output tensor."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_bytes": self.peak_bytes,
            "tensors": [_entry(step, target) for step in self.steps for target in step.targets],
        }


def plan_of(steps: Sequence[Step], order: Sequence[str]) -> ConversionPlan:
    """The plan of `steps` for output files in `order` (names).

    Steps are sorted by their first target, and each step's targets too.
    """
    rank = {name: index for index, name in enumerate(order)}
    sorted_steps = [
        Step(step.operation, tuple(sorted(step.targets, key=lambda target: rank[target.name]))) for step in steps
    ]
    sorted_steps.sort(key=lambda step: rank[step.targets[0].name])
    targets = {target.name: target for step in sorted_steps for target in step.targets}
    return ConversionPlan(tuple(sorted_steps), tuple(targets[name] for name in order))


def _entry(step: Step, target: Target) -> dict[str, Any]:
    return {
        "target": target.name,
        "operation": str(step.operation),
        "sources": [str(source) for source in step.operation.sources],
        "dtype": target.dtype.value,
        "shape": list(target.shape),
        "bytes": target.num_bytes,
    }
