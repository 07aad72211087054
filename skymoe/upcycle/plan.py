"""The conversion as data: which tensor of the source becomes which tensors of the output. No torch.

Each source tensor appears once, so it is read once, however many experts it becomes; execution (`run.py`) only
replays the list. Memory is bounded by one tensor because no step needs two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from skymoe.base.dtype import DType
from skymoe.spec.model import ModelSpec
from skymoe.weights.header import TensorInfo
from skymoe.weights.names import Place, file_names, tensor_table


class Operation(StrEnum):
    """What is done to make the target."""

    COPY = "copy"
    NORMAL = "normal"  # random, seeded by the parameter's name
    ZEROS = "zeros"


@dataclass(frozen=True)
class Step:
    """One tensor in (or made), one or more tensors out.

    Attributes:
        source: file name in the source; empty when the tensor is made.
        operation: what is done.
        targets: file names in the output.
        parameter: module name of the (first) target; it seeds random values.
        shape, dtype: of each target.
    """

    source: str
    operation: Operation
    targets: tuple[str, ...]
    parameter: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def num_bytes(self) -> int:
        """Bytes of one target."""
        return TensorInfo(self.dtype, self.shape).num_bytes

    def __str__(self) -> str:
        first, count = self.targets[0], len(self.targets)
        target = first if count == 1 else f"{first} and {count - 1} more experts"
        shape = "x".join(map(str, self.shape))
        return f"{self.operation:<6} {self.source or '-':<56} -> {target}  [{shape} {self.dtype}]"


@dataclass(frozen=True)
class UpcyclePlan:
    """All steps, and the output's tensors in file order.

    Attributes:
        dense, target: the two models.
        steps: in the order of the source.
        tensors: (name, dtype, shape) of every output tensor, in file order.
    """

    dense: ModelSpec
    target: ModelSpec
    steps: tuple[Step, ...]
    tensors: tuple[tuple[str, DType, tuple[int, ...]], ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all source tensors, at the output's dtype."""
        return sum(step.num_bytes for step in self.steps if step.source)

    @property
    def bytes_written(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.num_bytes * len(step.targets) for step in self.steps)

    def __str__(self) -> str:
        """The steps outside the layers and those of layer 0, and the totals."""
        lines = [str(step) for step in self.steps if not _of_later_layer(step)]
        totals = f"{len(self.steps)} steps, {len(self.tensors)} tensors"
        sizes = f"{self.bytes_read / 1e9:.2f} GB read, {self.bytes_written / 1e9:.2f} GB written"
        rest = f"... and so on for {self.dense.num_layers} layers" if self.dense.num_layers > 1 else ""
        return "\n".join([*lines, *([rest] if rest else []), f"{totals}: {sizes}"])


def plan_copy(
    dense: ModelSpec, target: ModelSpec, tensors: Mapping[str, TensorInfo], dtype: DType | None = None
) -> UpcyclePlan:
    """Plan method `copy`.

    Args:
        dense: spec of the source.
        target: spec of the output, of the same attention and embedding.
        tensors: the source's tensors; their dtypes are kept unless `dtype` is given.
        dtype: of every output tensor.
    """
    source_names = {place.parameter: name for place, name in file_names(dense).items()}
    router_dtype = dtype or tensors[source_names["embed.weight"]].dtype
    steps: dict[str, Step] = {}
    planned = []
    for name, place in tensor_table(target).items():
        source = source_names.get(_origin(place), "")
        kept = dtype or (tensors[source].dtype if source else router_dtype)
        planned.append((name, kept, place.shape))
        if source and source in steps:
            old = steps[source]
            steps[source] = Step(source, old.operation, (*old.targets, name), old.parameter, old.shape, old.dtype)
            continue
        operation = Operation.COPY if source else _made(place)
        steps[source or name] = Step(source, operation, (name,), place.parameter, place.shape, kept)
    return UpcyclePlan(dense, target, tuple(steps.values()), tuple(planned))


def _origin(place: Place) -> str:
    """The dense parameter that this part of the output is a copy of; the own name where it is none."""
    if place.expert is None:
        return place.parameter
    layer = place.parameter.partition(".moe.experts.")[0]
    if place.rows is None:
        return f"{layer}.mlp.down.weight"
    return f"{layer}.mlp.{'gate' if place.rows[0] == 0 else 'up'}.weight"


def _made(place: Place) -> Operation:
    """New tensors: the router and the shared expert's inner matrices are random; what must add nothing is zero."""
    zero = place.parameter.endswith((".moe.shared.down.weight", ".moe.shared_gate.weight", ".expert_bias"))
    return Operation.ZEROS if zero else Operation.NORMAL


def _of_later_layer(step: Step) -> bool:
    return step.parameter.startswith("layers.") and not step.parameter.startswith("layers.0.")
