"""The quantization as data: each source matrix is read once and gives its codes and its scale. No torch.

What is not FP8 is written in one type, that of the embedding. transformers leaves such tensors as they are stored,
decodes the rest to the type that config.json names, and computes with no mixture of the two: a router in fp32 beside
bf16 weights (a folded one, say) would load and then fail. Only the bias of the experts' choice stays in fp32, as every
skymoe directory has it: it is added to scores, which are fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from skymoe.base.dtype import DType
from skymoe.convert.plan import ConversionPlan, Copy, Operation, Source, Step, Target, plan_of
from skymoe.quantize.policy import Choice, choose, not_converted
from skymoe.spec.model import ModelSpec
from skymoe.spec.quantization import STYLE_OF, Fp8Scheme, QuantizationSpec
from skymoe.weights.header import TensorInfo
from skymoe.weights.match import EMBEDDING_NAME
from skymoe.weights.names import Place, tensor_table

_BUFFERS = 4 * 2**20  # bytes of ops.fp8's chunks


@dataclass(frozen=True)
class ToFp8(Operation):
    """Round matrices to e4m3. Result 2 i is the codes of matrix i, result 2 i + 1 its scale.

    Attributes:
        matrices: several where they share one scale.
        names: what their codes are called in the output.
        scheme: which of their weights share a scale.
    """

    matrices: tuple[Source, ...]
    names: tuple[str, ...]
    scheme: Fp8Scheme

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.matrices

    @property
    def working_bytes(self) -> int:
        return _BUFFERS

    def __str__(self) -> str:
        return f"fp8 by {self.scheme}"


@dataclass(frozen=True)
class Rounded(Operation):
    """A tensor that does not become FP8, in a type that does not hold all of its numbers."""

    source: Source
    dtype: DType

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    def __str__(self) -> str:
        return f"rounded to {self.dtype}"


@dataclass(frozen=True)
class QuantizePlan:
    """What will be written, and what is left as it is.

    Attributes:
        conversion: every tensor.
        quantization: for config.json.
        bytes_by_kind: of the output's tensors: "fp8", "scales", "kept".
        tensors_quantized, tensors_kept: how many of the source's there are of each.
        unfit: matrices that policy wants in FP8 but whose shape the format cannot scale.
        rounded: kept tensors that lose digits, because the embedding is stored in a narrower type.
    """

    conversion: ConversionPlan
    quantization: QuantizationSpec
    bytes_by_kind: Mapping[str, int]
    tensors_quantized: int
    tensors_kept: int
    unfit: tuple[str, ...]
    rounded: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(self.bytes_by_kind.values())

    @property
    def main_dtype(self) -> DType:
        """What the embedding and all that is not FP8 are stored in; what config.json calls the type of the model."""
        return next(target.dtype for target in self.conversion.tensors if target.name == EMBEDDING_NAME)


def sources_of(spec: ModelSpec, dtype: DType) -> dict[Place, Source]:
    """The sources of a model that exists on paper only (a preset)."""
    return {place: Source(0, name, TensorInfo(dtype, place.shape)) for name, place in tensor_table(spec).items()}


def plan_quantize(
    spec: ModelSpec, sources: Mapping[Place, Source], scheme: Fp8Scheme, *, decoded: Collection[str] = ()
) -> QuantizePlan:
    """Plan the FP8 form of a model.

    Args:
        spec: of the model.
        sources: where the values of each place are (`Parent.sources`).
        scheme: what to write.
        decoded: names of sources that are FP8 on disk and are given out in fp32; such an embedding becomes bfloat16.
    """
    table = tensor_table(spec)
    choice = choose(table, scheme)
    kept = not_converted(table, [place for group in choice.groups for place in group])
    quantization = QuantizationSpec(scheme=scheme, style=STYLE_OF[scheme], not_converted=kept)
    names = {place: name for name, place in table.items()}
    steps = [_to_fp8([(names[place], sources[place]) for place in group], quantization) for group in choice.groups]
    written = {target.name for step in steps for target in step.targets}
    embedding = sources[table[EMBEDDING_NAME]]
    main = DType.BFLOAT16 if embedding.name in decoded else embedding.dtype
    steps += [_kept(name, place, sources[place], main) for name, place in table.items() if name not in written]
    suffix = quantization.scale_suffix
    order = [part for name in table for part in ((name, name + suffix) if name in written else (name,))]
    return _counted(plan_of(steps, order), quantization, choice, len(table))


def _kept(name: str, place: Place, source: Source, main: DType) -> Step:
    dtype = DType.FLOAT32 if place.parameter.endswith(".expert_bias") else main
    holds_all = dtype is source.dtype or dtype.itemsize > source.dtype.itemsize  # bf16 and fp16 do not hold each other
    operation = Copy(source) if holds_all else Rounded(source, dtype)
    return Step(operation, (Target(name, dtype, place.shape),))


def _to_fp8(group: Sequence[tuple[str, Source]], quantization: QuantizationSpec) -> Step:
    targets = []
    for i, (name, source) in enumerate(group):
        shape = quantization.scale_shape(source.shape)
        targets.append(Target(name, DType.FLOAT8_E4M3, source.shape, slot=2 * i))
        targets.append(Target(name + quantization.scale_suffix, DType.FLOAT32, shape, slot=2 * i + 1))
    names, matrices = zip(*group, strict=True)
    return Step(ToFp8(matrices, names, quantization.scheme), tuple(targets))


def _counted(plan: ConversionPlan, quantization: QuantizationSpec, choice: Choice, num_tensors: int) -> QuantizePlan:
    sizes = {"fp8": 0, "scales": 0, "kept": 0}
    for step in plan.steps:
        for target in step.targets:
            is_fp8 = isinstance(step.operation, ToFp8)
            kind = "kept" if not is_fp8 else "scales" if target.slot % 2 else "fp8"
            sizes[kind] += target.num_bytes
    count = sum(len(group) for group in choice.groups)
    rounded = tuple(step.targets[0].name for step in plan.steps if isinstance(step.operation, Rounded))
    return QuantizePlan(plan, quantization, sizes, count, num_tensors - count, choice.unfit, rounded)
