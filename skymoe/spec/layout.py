"""Layout: how a model and its training step are divided over ranks. Every division in it is a Split.

    rank = (pp * DP + dp) * TP + tp          tensor-parallel ranks are neighbours, pipeline stages are far apart

The expert axis is a choice among the same ranks (Skywork-MoE, appendix B.1):

    edp     experts over tp                  the tokens that pass the tensor-parallel group in attention pass it again
                                             in the experts; expert gradients reduce over dp, like attention's
    ep      experts over dp x tp             every expert exists once in a stage
    etp     experts over dp, each cut by tp

and so is the way in which tokens reach their experts:

    R       every rank of the group has all tokens; partial outputs are summed (all-reduce)
    G       tokens are divided over tp (sequence parallelism); all-gather before, reduce-scatter after
    A       tokens are divided over tp; all-to-all before and after

The pipeline is cut between layers or, finer, between the attention and the feed-forward of a layer: its units are
*halves*, 2l and 2l + 1 for layer l. The embedding belongs to the first stage, final norm and head to the last. A rank
has one stage (1F1B) or several (interleaved: stage s on rank s mod PP; zbv: down the ranks and up again).

Nothing needs to divide anything. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from skymoe.base.errors import ConfigError
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split


class ExpertAxis(StrEnum):
    """Over which ranks the experts of a layer are divided."""

    EDP = "edp"
    EP = "ep"
    ETP = "etp"


class DispatchMode(StrEnum):
    """How tokens reach their experts: replicated, all-gather, all-to-all."""

    REPLICATED = "R"
    GATHERED = "G"
    ALL_TO_ALL = "A"


class ScheduleKind(StrEnum):
    """The order of forward and backward passes in the pipeline."""

    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zbv"


class Coordinate(NamedTuple):
    """Where a rank stands on each axis."""

    pp: int
    dp: int
    tp: int


class Half(NamedTuple):
    """A unit of the pipeline: the attention (with its norm and residual) or the feed-forward of one layer."""

    layer: int
    is_attention: bool


def stage_owner(schedule: ScheduleKind, pp: int, stage: int) -> int:
    """The pipeline rank that has `stage`: round the ranks, or under zbv down them and up again."""
    if schedule is ScheduleKind.ZERO_BUBBLE and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def stages_of_rank(schedule: ScheduleKind, pp: int, num_stages: int, rank: int) -> tuple[int, ...]:
    """The stages of a pipeline rank, ascending."""
    return tuple(stage for stage in range(num_stages) if stage_owner(schedule, pp, stage) == rank)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A division of a model over `pp * dp * tp` ranks.

    Attributes:
        pp, dp, tp: ranks per axis.
        expert: the expert axis.
        dispatch: the way of the tokens.
        schedule: of the pipeline.
        stages: halves per stage, over `pp * chunks` stages in the order of the model.
        recompute: per stage, how many of its layers (those that come first) are run again in the backward pass; a
            layer that is cut counts as one in both its stages.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    expert: ExpertAxis = ExpertAxis.EDP
    dispatch: DispatchMode = DispatchMode.GATHERED
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    stages: Split
    recompute: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for axis in ("pp", "dp", "tp"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"{axis} must be at least 1, got {getattr(self, axis)}")
        for name, kind in (("expert", ExpertAxis), ("dispatch", DispatchMode), ("schedule", ScheduleKind)):
            object.__setattr__(self, name, _choice(name, kind, getattr(self, name)))
        num_stages = self.stages.num_ranks
        if num_stages % self.pp:
            raise ConfigError(f"{num_stages} stages are not a multiple of pp {self.pp}")
        if self.schedule is ScheduleKind.ONE_F_ONE_B and num_stages != self.pp:
            raise ConfigError(f"1f1b has one stage per rank: {self.pp}, got {num_stages}")
        if self.schedule is ScheduleKind.ZERO_BUBBLE and num_stages != 2 * self.pp:
            raise ConfigError(f"zbv has two stages per rank: {2 * self.pp}, got {num_stages}")
        if not self.recompute:
            object.__setattr__(self, "recompute", (0,) * num_stages)
        if len(self.recompute) != num_stages or min(self.recompute) < 0:
            raise ConfigError(
                f"recompute needs a count for each of the {num_stages} stages, got {list(self.recompute)}"
            )

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.tp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, several per rank under interleaved and zbv."""
        return self.stages.num_ranks

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms, residuals and routers work on a part of the tokens each (modes G and A)."""
        return self.dispatch is not DispatchMode.REPLICATED

    @property
    def expert_ranks(self) -> int:
        """Over how many ranks the experts of a layer are divided."""
        return {ExpertAxis.EDP: self.tp, ExpertAxis.EP: self.dp * self.tp, ExpertAxis.ETP: self.dp}[self.expert]

    def coordinate(self, rank: int) -> Coordinate:
        """Where `rank` stands."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is outside a layout of {self.world_size} ranks")
        return Coordinate(rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp)

    def rank(self, coordinate: Coordinate) -> int:
        """The inverse of `coordinate`."""
        return (coordinate.pp * self.dp + coordinate.dp) * self.tp + coordinate.tp

    def expert_rank(self, coordinate: Coordinate) -> int:
        """Which part of the experts a rank has."""
        return {
            ExpertAxis.EDP: coordinate.tp,
            ExpertAxis.EP: coordinate.dp * self.tp + coordinate.tp,
            ExpertAxis.ETP: coordinate.dp,
        }[self.expert]

    def stage_owner(self, stage: int) -> int:
        """The pipeline rank that has `stage`."""
        return stage_owner(self.schedule, self.pp, stage)

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, ascending."""
        return stages_of_rank(self.schedule, self.pp, self.num_stages, pp)

    def halves(self, stage: int) -> tuple[Half, ...]:
        """What `stage` computes, in order; the first stage also has the embedding, the last norm and head."""
        return tuple(Half(unit // 2, unit % 2 == 0) for unit in self.stages.part(stage))

    def recomputed_layers(self, stage: int) -> frozenset[int]:
        """Global ids of the layers of `stage` that are run again in the backward pass."""
        layers = sorted({half.layer for half in self.halves(stage)})
        return frozenset(layers[: self.recompute[stage]])

    def heads(self, spec: ModelSpec) -> Split:
        """Key/value groups over tp; each brings its query heads along."""
        return Split.remainder_first(spec.num_kv_heads, self.tp)

    def ffn(self, size: int) -> Split:
        """Columns of a feed-forward of inner width `size` over tp, in the largest blocks up to 64 that divide it."""
        return column_blocks(size, self.tp)

    def vocabulary(self, spec: ModelSpec) -> Split:
        """Rows of embedding and head over tp."""
        return Split.remainder_first(spec.vocab_size, self.tp)

    def experts(self, num_experts: int) -> Split:
        """Experts over the ranks of the expert axis."""
        return Split.remainder_first(num_experts, self.expert_ranks)

    def tokens(self, num_tokens: int) -> Split:
        """Tokens of a micro-batch over tp, where they are divided at all (`sequence_parallel`)."""
        return Split.remainder_first(num_tokens, self.tp)

    def check(self, spec: ModelSpec) -> None:
        """Raises ConfigError when `spec` cannot be divided so, naming the axis."""
        if self.stages.num_units != 2 * spec.num_layers:
            raise ConfigError(
                f"the stages hold {self.stages.num_units / 2:g} layers, the model has {spec.num_layers}",
                where="parallel.split",
            )
        inner = self.stages.sizes[1:-1]
        if inner and min(inner) == 0:
            raise ConfigError(
                f"{self.num_stages} stages for {spec.num_layers} layers: one has none",
                where="parallel.pp",
                hint="only the first stage (embedding) and the last (head) may be without layers",
            )
        if self.tp > spec.num_kv_heads:
            raise ConfigError(
                f"tp {self.tp} is more than the {spec.num_kv_heads} key/value heads",
                where="parallel.tp",
                why="a head is not cut",
                hint=f"tp of at most {spec.num_kv_heads}",
            )
        if spec.moe is not None and self.expert_ranks > spec.moe.num_experts:
            raise ConfigError(
                f"{spec.moe.num_experts} experts over {self.expert_ranks} ranks ({self.expert}): some would have none",
                where="parallel.expert",
                hint="parallel.expert=edp" if self.expert is not ExpertAxis.EDP else "a smaller parallel.tp",
            )


def column_blocks(size: int, num_ranks: int) -> Split:
    """`size` columns over ranks, in the largest blocks up to 64 that divide it."""
    block = next(b for b in (64, 32, 16, 8, 4, 2, 1) if size % b == 0 and (size // b >= num_ranks or b == 1))
    return Split.remainder_first(size // block, num_ranks).scaled(block)


def _choice(name: str, kind: type[StrEnum], value: str) -> StrEnum:
    """`value` as the enum, so that a plain "edp" is one and a word that is none does not pass."""
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name} is one of {', '.join(kind)}, got {value!r}") from None
