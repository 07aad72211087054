"""RanksEngine: the engine of a run whose model is divided over ranks. Every rank has one, and calls it alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skymoe.base.dtype import DType
from skymoe.base.errors import CheckpointError, ConfigError
from skymoe.ops.balance import RouterMetrics
from skymoe.ops.deferred import DeferredWeights
from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.agree import agree, any_of
from skymoe.parallel.async_save import AsyncSaver
from skymoe.parallel.checkpoint import latest_generation_distributed, save_generation_distributed
from skymoe.parallel.deferred import defer_weights
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.part import Part
from skymoe.parallel.pipeline import Pipeline
from skymoe.parallel.spread import build_parts, initialize_parts, load_parts
from skymoe.parallel.timelines import whole_timeline
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.plan.timeline import Timeline
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.model import ModelSpec
from skymoe.train.batches import MicroBatch, StepBatch
from skymoe.train.config import BatchConfig, OptimizerConfig, TrainConfig
from skymoe.train.division import Division
from skymoe.train.engine import restore_rng, rng_states
from skymoe.train.evaluate import Held
from skymoe.train.evaluate_ranks import evaluate_on_ranks
from skymoe.train.objective import Objective, StepSums
from skymoe.train.passes import Pass, gate_figures, gradients
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.division import layout_document
from skymoe.weights.generation import Generation
from skymoe.weights.names import parameter_shapes
from skymoe.weights.pieces import SavedPiece, whole_pieces
from skymoe.weights.sliced import SlicedGeneration


class RanksEngine:
    """Parts of the model, the pipeline through them and the divided optimizer.

    Args:
        config: the recipe.
        spec: of the whole model.
        mesh: of this rank.
        load_weights: False leaves arbitrary values: a checkpoint follows.

    Raises:
        ConfigError: model or batch cannot be divided so.
        FormatError: the model of the recipe cannot be read.
    """

    def __init__(self, config: TrainConfig, spec: ModelSpec, mesh: Mesh, *, load_weights: bool) -> None:
        batch, parallel, weights = config.batch, config.parallel, torch_dtype(config.precision.weights)
        micro = batch.micro_sequences or batch.sequences // mesh.layout.dp
        num_micro = micro_batches(batch, mesh.layout)
        num_tokens = micro * config.data.sequence_length
        options = PartOptions(num_tokens=num_tokens, overlap=parallel.overlap, chunks=parallel.dispatch_chunks)
        self.parts = build_parts(spec, mesh, options, dtype=weights)
        if load_weights and config.model.path is not None:
            load_parts(self.parts, config.model.path)
        elif load_weights:
            initialize_parts(self.parts, config.run.seed)
        self.optimizer = _optimizer(self.parts, mesh, config)
        self.division = Division(spec, mesh, self.parts)
        puts_off = mesh.layout.schedule is ScheduleKind.ZERO_BUBBLE
        deferred = {n: defer_weights(part, DeferredWeights()) for n, part in self.parts.items()} if puts_off else None
        self.pipeline: Pipeline[MicroBatch] = Pipeline(
            tuple(self.parts),
            mesh,
            num_micro=num_micro,
            rows=next(iter(self.parts.values())).tokens.num_rows,
            hidden_size=spec.hidden_size,
            dtype=weights,
            before_stage=self.optimizer.ready,
            after_stage=self.optimizer.reduce,
            deferred=deferred,
        )
        self._asynchronous = config.checkpoint.asynchronous
        self._saver: AsyncSaver | None = None
        self._last: Pass | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.division.spec

    @property
    def mesh(self) -> Mesh:
        """Where this rank stands."""
        return self.division.mesh

    def gradients(self, batch: StepBatch, objective: Objective, alpha_L: Sequence[float]) -> StepSums:
        ready = self.optimizer.ready
        sums, self._last = gradients(self.division, self.pipeline, batch, objective, alpha_L, ready)
        self.pipeline.clock.meet()  # what is counted has just been summed over the world
        return sums

    def gate_figures(self, sums: StepSums) -> list[RouterMetrics]:
        assert self._last is not None
        return gate_figures(self.division, self._last)

    def expert_biases(self) -> Mapping[int, Tensor]:
        index = self.division.moe_index
        routers = {index[layer]: router for part in self.parts.values() for layer, router in part.routers().items()}
        return {place: router.expert_bias for place, router in routers.items() if router.expert_bias is not None}

    def evaluate(self, held: Held, compute: torch.dtype | None) -> dict[str, Any]:
        self.optimizer.settle()
        return evaluate_on_ranks(self.division, self.pipeline, held, compute)

    def non_finite(self) -> list[str]:
        self.optimizer.settle()
        named = [named for part in self.parts.values() for named in part.named_parameters()]
        bad = [name for name, parameter in named if not bool(parameter.isfinite().all())]
        reason = agree(not bad, ", ".join(bad[:5]), self.mesh.world, self.mesh.device)
        return [] if reason is None else reason.split(", ")

    def save(self, root: Path, step: int, document: Mapping[str, Any], keep: int) -> Path | None:
        self.optimizer.settle()
        documents, layout = {"state": document}, layout_document(self.mesh.layout)
        if not self._asynchronous:
            return save_generation_distributed(root, step, self._pieces(), documents, self.mesh, layout, keep)
        if self._saver is None:
            self._saver = AsyncSaver(root, self.mesh, keep=keep)
        self._saver.save(step, self._pieces(), documents, layout)
        return None

    def poll(self) -> Path | None:
        return self._saver.poll() if self._saver else None

    def finish(self) -> Path | None:
        return self._saver.flush() if self._saver else None

    def latest(self, root: Path) -> Generation | None:
        return latest_generation_distributed(root, self.mesh)

    def any_of(self, flag: bool) -> bool:
        return any_of(flag, self.mesh.world, self.mesh.device)

    @torch.no_grad()
    def restore(self, generation: Generation) -> None:
        sliced = SlicedGeneration(generation)
        if differing := sorted(parameter_shapes(self.spec).keys() ^ sliced.names("model").keys()):
            why = f"tensors: {', '.join(differing[:5])}"
            raise CheckpointError("the checkpoint is of another model", where=generation.path, why=why)
        self.optimizer.restore(sliced.read)
        for name, bias in self._named_biases():
            saved = sliced.read("model", name, None)
            assert saved is not None
            bias.copy_(saved)
        restore_rng({name: state for name in sliced.names("rng") if (state := sliced.read("rng", name)) is not None})

    def timeline(self) -> Timeline | None:
        return whole_timeline(self.pipeline.clock, self.mesh)

    def tell(self, phase: Callable[[str, bool], None]) -> None:
        self.pipeline.clock.tell = phase

    def _pieces(self) -> Iterator[SavedPiece]:
        """What this rank saves; replicated buffers and random states come from one of those that have them."""
        yield from self.optimizer.pieces()
        tensors = {}
        if self.mesh.coordinate.dp == 0 and self.mesh.coordinate.tp == 0:
            tensors["model"] = dict(self._named_biases())
        if self.mesh.rank == 0:
            tensors["rng"] = rng_states()
        yield from whole_pieces(tensors)

    def _named_biases(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts.values():
            yield from part.named_buffers()


def micro_batches(batch: BatchConfig, layout: Layout) -> int:
    """Micro-batches of a replica per step.

    Raises:
        ConfigError: the sequences of a step cannot be divided into equal micro-batches over the replicas.
    """
    micro = batch.micro_sequences or max(1, batch.sequences // layout.dp)
    if batch.sequences % (layout.dp * micro):
        unit = layout.dp * micro
        raise ConfigError(
            f"{batch.sequences} sequences a step do not make equal micro-batches of {micro} on {layout.dp} replicas",
            where="batch.sequences",
            why="stages and replicas exchange tensors of fixed sizes",
            hint=f"batch.sequences={max(unit, batch.sequences // unit * unit)}",
        )
    return batch.sequences // (layout.dp * micro)


def _optimizer(parts: Mapping[int, Part], mesh: Mesh, config: TrainConfig) -> ZeroOptimizer:
    own = {
        stage: {name: (parameter, part.slices[name]) for name, parameter in part.named_parameters()}
        for stage, part in parts.items()
    }
    settings, weights = config.optimizer, torch_dtype(config.precision.weights)
    return ZeroOptimizer(
        own,
        mesh,
        AdamWSettings(betas=settings.betas, eps=settings.eps, clip=settings.clip),
        partial(_group, settings),
        tied={"embed.weight"} if next(iter(parts.values())).spec.tie_embeddings else (),
        gradients=torch.float64 if weights is torch.float64 else torch_dtype(DType(config.parallel.gradients)),
        overlap=config.parallel.overlap,
    )


def _group(settings: OptimizerConfig, name: str, parameter: nn.Parameter) -> GroupSettings:
    """The same three groups as on one process: see optim.py."""
    if name.endswith("moe.router.weight"):
        return GroupSettings(settings.router_weight_decay, settings.router_lr_ratio)
    return GroupSettings(settings.weight_decay if parameter.ndim > 1 else 0.0)
