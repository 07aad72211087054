"""A pipeline to be divided, in abstract units of time and memory, and the answer with its proof.

Units (layers, or halves of them) are divided in order over stages; each stage may run the first r of its layers again
in the backward pass and then keeps only their inputs. The first stage also has the embedding, the last one the head.

    F_s = sum f_u (+ embedding | head)        B_s = sum b_u + sum_{u run again} again_u (+ embedding | head)
    memory_s = sum static_u + k_s (sum_{u kept} activation_u + sum_{layers run again} checkpoint) + what runs <= memory

k_s is the number of micro-batches alive: min(P - s + extra_alive, m) under 1F1B. Units that share `layer` are halves of
one layer: run again together, with one checkpoint, that of the first one in the stage. "What runs" is the largest of:
a unit's transient; an end's; of a layer that is run again, its activation and its units' largest transient together.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split

SLACK = 1e-9
"""Relative: amounts of time or memory that are nearer are the same."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is never cut.

    Attributes:
        forward, backward: time of one micro-batch.
        weight: the part of `backward` that is gradients of weights.
        again: added to `backward` when run again; None means `forward`.
        static, activation, checkpoint: memory for good; per micro-batch when kept; per micro-batch when run again.
        transient: memory while it runs; the largest of a rank counts once.
        layer: units with the same number are halves of one layer.
    """

    forward: float
    backward: float
    weight: float = 0.0
    again: float | None = None
    static: float = 0.0
    activation: float = 0.0
    checkpoint: float = 0.0
    transient: float = 0.0
    layer: int


@dataclass(frozen=True, kw_only=True)
class End:
    """The embedding or the head. Never run again; `activation` per micro-batch alive, `transient` while it runs."""

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    static: float = 0.0
    activation: float = 0.0
    transient: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pipeline to be divided.

    Attributes:
        units: in order.
        num_ranks: P.
        num_micro: m.
        embedding, head: the ends.
        shared: on every stage, beside its units: a head that is divided over all ranks (vocabulary.py).
        extra_alive: micro-batches that every rank keeps longer than the order says, as far as there are so many.
        tied_static: of the head's `static`, what is one with the embedding's (a tied table); a rank that has both ends
            has it once.
        memory: per rank, or None for no limit.
        hop: from rank to rank, one way.
        schedule, chunks: of the pipeline, and stages per rank (1 for 1f1b, 2 for zbv).
        recompute: whether layers may be run again.
        whole_layers: stages end at layers' ends only.
    """

    units: tuple[Unit, ...]
    num_ranks: int
    num_micro: int
    embedding: End = End()
    head: End = End()
    shared: End = End()
    extra_alive: int = 0
    tied_static: float = 0.0
    memory: float | None = None
    hop: float = 0.0
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    chunks: int = 1
    recompute: bool = True
    whole_layers: bool = False

    @property
    def num_stages(self) -> int:
        """Stages over all ranks."""
        return self.num_ranks * self.chunks

    def may_be_empty(self, stage: int) -> bool:
        """Whether `stage` may be without units: the first one if it has an embedding, the last one if it has a head."""
        first = stage == 0 and self.embedding != End()
        return first or (stage == self.num_stages - 1 and self.head != End())


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How good an answer is.

    Attributes:
        optimal: proven: no division of this schedule is faster in simulation.
        lower_bound: no division is faster than this.
        gap: makespan / lower_bound - 1; 0 when optimal.
        method: how it was shown, in words.
        examined: divisions that were simulated.
    """

    optimal: bool
    lower_bound: float
    gap: float
    method: str
    examined: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A division.

    Attributes:
        stages: units per stage.
        recompute: layers run again per stage (the first ones; a cut layer counts in both its stages).
        makespan: of a step, simulated.
        memory: peak per rank.
        busy: time of the passes per rank.
        certificate: how good.
    """

    stages: Split
    recompute: tuple[int, ...]
    makespan: float
    memory: tuple[float, ...]
    busy: tuple[float, ...]
    certificate: Certificate

    @property
    def bubble(self) -> float:
        """Idle part of all ranks' time."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0
