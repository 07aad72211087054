"""The conversion as data: every tensor of the output and what makes it. No torch.

The table of the output's names (`weights.names`) is walked once, and each place is given an operation. Equal operations
become one step, so that a dense matrix that turns into eight equal experts is read once and written eight times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.convert.exactness import Exactness
from skymoe.convert.grouped_mm import grouped_mm_remarks
from skymoe.convert.plan import ConversionPlan, Copy, Operation, Step, Target, Zeros, plan_of
from skymoe.spec.model import ModelSpec
from skymoe.upcycle.blueprint import Blueprint, draw_blueprint
from skymoe.upcycle.config import Method, Rest, RouterInit, UpcycleConfig
from skymoe.upcycle.exactness import promise
from skymoe.upcycle.methods import Expert, Made, Matrix, Sources, dense_source, make_expert, shared_expert
from skymoe.upcycle.operations import Average, Centroids, CloneRows, Random, Shards
from skymoe.upcycle.target import target_spec
from skymoe.weights.names import Place, tensor_table

MAX_EXPERT_TENSORS = 2_000_000


@dataclass(frozen=True)
class Conversion:
    """All that is decided before a tensor moves.

    Attributes:
        base, target: the first source and the output.
        blueprint: the request with nothing left open.
        plan: every tensor.
        promise: whether the output computes what the base does, and why.
        remarks: what the user should know.
    """

    base: ModelSpec
    target: ModelSpec
    blueprint: Blueprint
    plan: ConversionPlan
    promise: Exactness
    remarks: tuple[str, ...]

    @property
    def main_dtype(self) -> DType:
        """The element type of most bytes."""
        sizes: dict[DType, int] = {}
        for target in self.plan.tensors:
            sizes[target.dtype] = sizes.get(target.dtype, 0) + target.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded to 16 bits on the way: then logits may differ although the method is exact."""
        return any(
            target.dtype.itemsize < 4 and (target.dtype is not source.dtype or not _is_power_of_2(step.operation))
            for step in self.plan.steps
            for target in step.targets
            for source in step.operation.sources
        )


def plan_conversion(
    config: UpcycleConfig,
    specs: Sequence[ModelSpec],
    sources: Sequence[Sources],
    *,
    text: str = "",
    remarks: tuple[str, ...] = (),
) -> Conversion:
    """Decide everything.

    Args:
        config: the request.
        specs, sources: of each parent: what it is, and where its tensors are, by hub place.
        text: SHA-256 of the tokens for `router_init=centroids`.
        remarks: what is known already, of the sources.

    Raises:
        ConfigError: the request cannot be met.
    """
    blueprint = draw_blueprint(config, specs)
    target, more = target_spec(specs[0], blueprint, config.format)
    _check_size(target)
    planner = _Planner(config, blueprint, target, sources, text)
    types = _several_types(sources) if config.dtype is None else ()
    told = (*remarks, *types, *more, *grouped_mm_remarks(target, config.dtype or planner.main_dtype))
    return Conversion(specs[0], target, blueprint, planner.plan(), promise(blueprint), told)


def _check_size(target: ModelSpec) -> None:
    """Refuse a number of tensors that would take all memory to write down; no model there is comes near it."""
    experts = target.moe.num_experts if target.moe else 0
    count = len(tuple(Matrix)) * experts * len(target.moe_layer_ids)
    if count > MAX_EXPERT_TENSORS:
        what = f"{experts} experts in each of {len(target.moe_layer_ids)} layers are {count:,} tensors"
        why = f"at most {MAX_EXPERT_TENSORS:,} are planned"
        raise ConfigError(what, why=why, hint="fewer experts, or fewer layers")


def _several_types(sources: Sequence[Sources]) -> tuple[str, ...]:
    """A remark when not all parents have the element types of the first."""
    types = [sorted({source.dtype.value for source in parent.values()}) for parent in sources]
    others = sorted({", ".join(each) for each in types[1:] if each != types[0]})
    first = ", ".join(types[0])
    told = f"sources are of {' and of '.join(others)}, the first one is of {first}: the output is as the first one"
    return (told,) if others else ()


class _Planner:
    """Holds what all decisions read; each method decides about one kind of tensor."""

    def __init__(
        self, config: UpcycleConfig, blueprint: Blueprint, target: ModelSpec, sources: Sequence[Sources], text: str
    ) -> None:
        self.config, self.blueprint, self.target, self.text = config, blueprint, target, text
        self.sources = sources
        self.plain = [{p.parameter: s for p, s in parent.items() if p.expert is None} for parent in sources]
        self.main_dtype = self.plain[0]["embed.weight"].dtype

    def plan(self) -> ConversionPlan:
        """Every tensor of the output, equal operations as one step."""
        table = tensor_table(self.target)
        steps: dict[object, list[tuple[Operation, Target]]] = {}
        for name, place in table.items():
            made = self.make(place)
            target = Target(name, self.dtype(place, made.operation), place.shape, made.slot)
            key = made.operation if made.operation.sources else name  # what is read is read once
            steps.setdefault(key, []).append((made.operation, target))
        merged = [Step(group[0][0], tuple(target for _, target in group)) for group in steps.values()]
        return plan_of(merged, list(table))

    def dtype(self, place: Place, operation: Operation) -> DType:
        """That of the same tensor of the first source: specialists may be of several types, the output is of one."""
        if place.parameter.endswith("expert_bias"):
            return DType.FLOAT32
        if self.config.dtype is not None:
            return self.config.dtype
        if self.blueprint.method is Method.SPECIALISTS and place.expert is not None:
            return dense_source(_expert(place), self.plain[0]).dtype
        return operation.sources[0].dtype if operation.sources else self.main_dtype

    def make(self, place: Place) -> Made:
        """What makes the tensor at `place`."""
        layer, name = _layer_and_name(place.parameter)
        if place.expert is not None:
            return make_expert(_expert(place), place, self.blueprint, self.config, self.plain, self.sources[0])
        if name.startswith("moe.router.") and self.blueprint.method is Method.DUPLICATE:
            return Made(self.cloned_router(place))
        if name == "moe.router.weight":
            return Made(self.new_router(layer, place))
        if name == "moe.router.expert_bias":
            return Made(Zeros())
        if name.startswith("moe.shared") and place.parameter not in self.plain[0]:
            return self.shared(layer, name, place)
        return Made(self.kept(place))

    def kept(self, place: Place) -> Operation:
        """A tensor that upcycling does not change."""
        if self.blueprint.rest is Rest.AVERAGE and self.blueprint.method is Method.SPECIALISTS:
            return Average(tuple(parent[place.parameter] for parent in self.plain))
        return Copy(self.plain[0][place.parameter])

    def new_router(self, layer: int, place: Place) -> Operation:
        """Random rows, or centroids; the experts of a virtual group share one."""
        config, rows = self.config, self.blueprint.router_rows
        count, width = place.shape
        key = f"{config.seed}/{place.parameter}"
        if config.router_init is RouterInit.CENTROIDS:
            length = config.router_std * width**0.5  # that of a normal row
            return Centroids(layer, rows, width, length, count // rows, self.text, key)
        flat = config.router_init is RouterInit.UNIFORM
        return Random(rows, width, config.router_std, key, flat=flat, repeat=count // rows)

    def cloned_router(self, place: Place) -> Operation:
        """Rows of the parent's router once around; a bias on the probabilities shrinks as they do."""
        source, blueprint = self.plain[0][place.parameter], self.blueprint
        if place.parameter.endswith("expert_bias"):
            on_probabilities = blueprint.moe.gate_norm is None
            return CloneRows(source, place.shape[0], scale=1 / blueprint.clones if on_probabilities else 1.0)
        noise_key = f"{self.config.seed}/{place.parameter}" if blueprint.router_noise else ""
        return CloneRows(source, place.shape[0], noise=blueprint.router_noise, key=noise_key)

    def shared(self, layer: int, name: str, place: Place) -> Made:
        """A shared expert that the parent has not: asked for, or one that adds zero because the format insists."""
        if name == "moe.shared_gate.weight":
            return Made(Zeros())  # sigmoid(0) = 1/2 for every token
        matrix = Matrix(name.split(".")[2])
        if self.blueprint.moe.shared_ffn_size:
            return shared_expert(layer, matrix, self.plain[0], self.blueprint)
        if matrix is Matrix.DOWN:
            return Made(Zeros())
        rows, width = place.shape
        return Made(Random(rows, width, self.target.init_std, f"{self.config.seed}/{place.parameter}"))


def _is_power_of_2(operation: Operation) -> bool:
    """Whether its factor only moves exponents."""
    return not isinstance(operation, (Copy, Shards)) or math.frexp(operation.scale)[0] == 0.5


def _expert(place: Place) -> Expert:
    assert place.expert is not None
    return Expert(_layer_and_name(place.parameter)[0], place.expert, _matrix(place))


def _matrix(place: Place) -> Matrix:
    if place.rows is None:
        return Matrix.DOWN
    return Matrix.GATE if place.rows[0] == 0 else Matrix.UP


def _layer_and_name(parameter: str) -> tuple[int, str]:
    """("layers.3.moe.router.weight") as (3, "moe.router.weight"); -1 for what is in no layer."""
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", parameter)
    return (int(found[1]), found[2]) if found else (-1, parameter)
