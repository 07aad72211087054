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

import torch
from torch import Tensor

from skymoe.base.errors import CheckpointError
from skymoe.model.transformer import Transformer
from skymoe.ops.balance import AdaptiveCoefficients
from skymoe.train.guard import Guard
from skymoe.train.optim import Optimizer
from skymoe.weights.generation import Generation, save_generation

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

    model: Transformer
    optimizer: Optimizer
    alpha: AdaptiveCoefficients
    guard: Guard
    counters: Counters = field(default_factory=Counters)
    evaluation: dict[str, Any] | None = None

    def non_finite_weights(self) -> list[str]:
        """Names of parameters that hold NaN or infinity."""
        return [name for name, parameter in self.model.named_parameters() if not bool(parameter.isfinite().all())]


def save_state(state: TrainState, root: Path, *, identity: Mapping[str, Any], keep: int) -> Path:
    """Write the state as a new generation under `root`; returns its directory.

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
    return save_generation(
        root,
        state.counters.step,
        tensors={
            "model": {name: tensor.detach() for name, tensor in state.model.state_dict().items()},
            "optimizer": state.optimizer.tensors(),
            "rng": _rng_states(),
        },
        documents={"state": document},
        layout={"world_size": 1},
        keep=keep,
    )


@torch.no_grad()
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
    _restore_model(state.model, generation.tensors("model"), generation.path)
    state.optimizer.restore(generation.tensors("optimizer"))
    _restore_rng(generation.tensors("rng"))
    state.alpha.restore(document["alpha"])
    state.guard.restore(document["guard"])
    counters = document["counters"]
    state.counters = Counters(**{**counters, "window": Window(**counters["window"])})
    state.evaluation = document["evaluation"]


def _restore_model(model: Transformer, tensors: Mapping[str, Tensor], where: Path) -> None:
    own = model.state_dict()
    if differing := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(
            "the checkpoint is of another model", where=where, why=f"tensors: {', '.join(differing[:5])}"
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            found = f"{tensors[name].dtype} {list(tensors[name].shape)}"
            raise CheckpointError(f"{name} is {found}, expected {tensor.dtype} {list(tensor.shape)}", where=where)
        tensor.copy_(tensors[name])


def _rng_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_rng(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for name, rng_state in states.items():
        device, _, index = name.partition(".")
        if device == "cuda" and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(rng_state, int(index))
