"""Work: one micro-batch of one model on one division of one machine. What is priced, in time and in bytes.

A `Division` is wider than a `Layout`: published runs use expert and context parallelism in ways that this package's
runtime does not have (MoE parallel folding: experts over any part of a stage's ranks). `Division.of` translates a
Layout. How layers go to stages is not here: prices are per half layer (attention | feed-forward), and the solver, the
search and the simulator add them up. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from skymoe.plan.hardware.gpu import Cluster, Precision
from skymoe.plan.shape import ModelShape
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout


class Recompute(StrEnum):
    """What of every layer is computed again in the backward pass, beside the layers that are run again whole."""

    NONE = "none"
    SELECTIVE = "selective"  # the attention core (Korthikanti et al. 2022); nothing more with flash attention
    MOE_ACT = "moe_act"  # the activation between an expert's (or a dense feed-forward's) matrices, and norms
    FULL = "full"  # whole layers: only their inputs are kept


@dataclass(frozen=True, kw_only=True)
class Division:
    """Over how many ranks what is divided.

    Attributes:
        pp, dp, tp, cp: pipeline, data, tensor, context parallel ranks; world = pp * dp * tp * cp.
        ep, etp: ranks over which experts are divided, and over which each expert is cut; within a stage's ranks.
        expert_stride: distance in rank numbers of neighbours in the expert group: 1 when it starts within tp.
        dispatch: how tokens reach experts (R, G, A).
        sequence_parallel: norms and residuals on a part of the tokens each (modes G and A).
        zero_stage: 0 (none), 1 (optimizer), 2 (and gradients), 3 (and weights: FSDP).
        zero_ranks: data-parallel ranks over which ZeRO divides; None for all.
        weight_bytes, gradient_bytes, optimizer_bytes: per parameter; the optimizer's 12 are fp32 master and moments.
        overlap: communication of data parallelism is hidden behind computation where it can be.
        tensor_overlap: that of tensor parallelism too, in pieces beside the products (Transformer Engine).
        node_dispatch: a token crosses to a node once, whatever number of its experts are there (DeepEP).
        expert_overlap: dispatch and combine too, behind the computation of another micro-batch.
    """

    pp: int
    dp: int
    tp: int
    cp: int = 1
    ep: int = 1
    etp: int = 1
    expert_stride: int = 1
    dispatch: DispatchMode = DispatchMode.ALL_TO_ALL
    sequence_parallel: bool = True
    zero_stage: int = 1
    zero_ranks: int | None = None
    weight_bytes: float = 2.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 12.0
    overlap: bool = True
    tensor_overlap: bool = False
    node_dispatch: bool = False
    expert_overlap: bool = False

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.tp * self.cp

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold one stage."""
        return self.dp * self.tp * self.cp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same (part of an) expert."""
        return max(1, self.stage_ranks // (self.ep * self.etp))

    @classmethod
    def of(cls, layout: Layout, *, weight_bytes: float = 2.0, gradient_bytes: float = 4.0) -> Division:
        """As this package's runtime divides: edp, ep, etp; ZeRO-1 over dp."""
        ep, etp, stride = {
            ExpertAxis.EDP: (layout.tp, 1, 1),
            ExpertAxis.EP: (layout.dp * layout.tp, 1, 1),
            ExpertAxis.ETP: (layout.dp, layout.tp, layout.tp),
        }[layout.expert]
        return cls(
            pp=layout.pp, dp=layout.dp, tp=layout.tp, ep=ep, etp=etp, expert_stride=stride, dispatch=layout.dispatch,
            sequence_parallel=layout.sequence_parallel, weight_bytes=weight_bytes, gradient_bytes=gradient_bytes,
            optimizer_bytes=12.0 if weight_bytes < 4 else 8.0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """One micro-batch.

    Attributes:
        shape: the model.
        division: over ranks.
        cluster: the machine.
        sequence_length: tokens of one sequence (before context parallelism).
        micro_batch: sequences.
        num_micro: micro-batches of a step and replica.
        precision: of the matrix products of layers.
        recompute: of every layer (see `Recompute`); layers run again whole are the stages' affair.
        flash: attention is fused, scores are never stored.
        imbalance: load of the fullest expert rank over the mean (dropless), at least 1.
        capacity: capacity factor when tokens are padded and dropped to it, else None.
        chunks: stages per pipeline rank (how much of the step's end they hide; see `step_end`).
    """

    shape: ModelShape
    division: Division
    cluster: Cluster
    sequence_length: int
    micro_batch: int
    num_micro: int
    precision: Precision = Precision.BF16
    recompute: Recompute = Recompute.NONE
    flash: bool = True
    imbalance: float = 1.0
    capacity: float | None = None
    chunks: int = 1

    @property
    def tokens(self) -> float:
        """Of one micro-batch on one context-parallel rank."""
        return self.sequence_length * self.micro_batch / self.division.cp

    @property
    def step_tokens(self) -> float:
        """Of a step, all replicas."""
        return float(self.sequence_length * self.micro_batch * self.num_micro * self.division.dp)
