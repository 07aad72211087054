"""Everything that one step leaves to the next: the state of a run, and its way to disk and back.

    model.safetensors       every parameter and buffer, by module name (the router's expert bias among them)
    optimizer.safetensors   `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`
    rng.safetensors         torch's generator states, as bytes
    state.json              counters, alpha per layer, guard statistics, the last evaluation, and who this run is:
                            recipe, model, data fingerprint

What is not here does not influence the next step. The position in the data is a sample number: with the mixture's
fingerprint and seed it names the next sample on any machine. Python writes doubles to JSON exactly, so alpha
returns bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skymoe.base.errors import CheckpointError
from skymoe.ops.balance import AdaptiveCoefficients
from skymoe.train.engine import Engine
from skymoe.train.guard import Guard
from skymoe.weights.generation import Generation

SCHEMA = 1


@dataclass
class Window:
    """Sums since the last line of metrics; divided when the line is written."""

    loss: float = 0.0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Counters:
    """Where the run is.

    Attributes:
        step: steps done, skipped ones among them.
        next_sample: the first sample not yet consumed.
        tokens: tokens trained on (pads and skipped batches are not).
        flops: model FLOPs of these tokens, causal attention.
        seconds: time in training steps (evaluation and saves are not).
        window: since the last line of metrics.
    """

    step: int = 0
    next_sample: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)


@dataclass
class TrainState:
    """The whole of it. The parts change in place; `alpha.alpha_L` is empty in a dense model."""

    engine: Engine
    alpha: AdaptiveCoefficients
    guard: Guard
    counters: Counters = field(default_factory=Counters)
    evaluation: dict[str, Any] | None = None


def save_state(state: TrainState, root: Path, *, identity: Mapping[str, Any], keep: int) -> Path | None:
    """Write the state as a new generation under `root`; its directory, or None when it is only begun (`Engine.save`).

    Args:
        state: not changed.
        root: directory of the generations.
        identity: recipe, model and data of the run, checked on resume.
        keep: generations kept.
    """
    document = {
        "schema": SCHEMA,
        "counters": asdict(state.counters),
        "alpha": state.alpha.state(),
        "guard": state.guard.state(),
        "evaluation": state.evaluation,
        **identity,
    }
    return state.engine.save(root, state.counters.step, document, keep)


def restore_state(state: TrainState, generation: Generation) -> None:
    """Put the generation's values into `state`.

    Raises:
        CheckpointError: it belongs to another model.
    """
    document = generation.document("state")
    if document.get("schema") != SCHEMA:
        raise CheckpointError(
            f"state of schema {document.get('schema')}, this version reads {SCHEMA}",
            where=generation.path / "state.json",
        )
    state.engine.restore(generation)
    state.alpha.restore(document["alpha"])
    state.guard.restore(document["guard"])
    counters = document["counters"]
    state.counters = Counters(**{**counters, "window": Window(**counters["window"])})
    state.evaluation = document["evaluation"]
