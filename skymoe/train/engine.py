"""Engine: what a step does with the model, on one process or on many ranks.

Everything above it (loop, guard, schedule, balance, metrics) is written once and sees the whole: sums over the global
batch, the norm over all parameters, figures of every layer. On many ranks each of them runs the same program, and an
engine's answers are the same on all; so are the decisions that follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skymoe.base.errors import CheckpointError
from skymoe.model.transformer import Transformer
from skymoe.ops.balance import RouterMetrics, router_metrics
from skymoe.parallel.async_save import AsyncSaver
from skymoe.parallel.mesh import single_mesh
from skymoe.plan.timeline import Timeline
from skymoe.spec.layout import Layout
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split
from skymoe.train.batches import StepBatch
from skymoe.train.evaluate import Held, evaluate
from skymoe.train.objective import Objective, StepSums, accumulate_gradients, moe_modules
from skymoe.train.optim import Optimizer
from skymoe.weights.generation import Generation, latest_generation, save_generation
from skymoe.weights.pieces import whole_pieces


class StepOptimizer(Protocol):
    """The part of an optimizer that a step needs."""

    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all gradients of the model."""
        ...

    def update(self, lr: float, grad_norm: float) -> None:
        """Clip by the norm already known, and take one step at the rate `lr`. The gradients are used up."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients of this step."""
        ...


class Engine(Protocol):
    """A model and its optimizer. Every method is called by all ranks, in the same order."""

    @property
    def spec(self) -> ModelSpec:
        """Of the whole model."""
        ...

    @property
    def optimizer(self) -> StepOptimizer:
        """Of all parameters."""
        ...

    def gradients(self, batch: StepBatch, objective: Objective, alpha_L: Sequence[float]) -> StepSums:
        """Add the gradient of the step's loss to every parameter's; returns the sums over the global batch."""
        ...

    def gate_figures(self, sums: StepSums) -> list[RouterMetrics]:
        """How each layer's gate behaved in the last micro-batch, which is costlier than a sum: for log steps."""
        ...

    def expert_biases(self) -> Mapping[int, Tensor]:
        """The loss-free biases here, by the layer's place among the MoE layers; to be changed in place."""
        ...

    def evaluate(self, held: Held, compute: torch.dtype | None) -> dict[str, Any]:
        """The fields of an `eval` line."""
        ...

    def non_finite(self) -> list[str]:
        """Names of parameters that hold NaN or infinity."""
        ...

    def save(self, root: Path, step: int, document: Mapping[str, Any], keep: int) -> Path | None:
        """Publish a generation of weights, optimizer and `document`; None when it is only begun, to be published later.

        Raises:
            MachineError: of this save, or of the one before that was begun.
        """
        ...

    def poll(self) -> Path | None:
        """At a step boundary: the generation that was begun and is now published. Raises as `save`."""
        ...

    def finish(self) -> Path | None:
        """Wait for what was begun. Raises as `save`."""
        ...

    def latest(self, root: Path) -> Generation | None:
        """The newest intact generation under `root`, the same on all ranks."""
        ...

    def any_of(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        ...

    def restore(self, generation: Generation) -> None:
        """Put a generation's weights and optimizer state in place. Raises CheckpointError: of another model."""
        ...

    def timeline(self) -> Timeline | None:
        """What all ranks did in the last step, on rank 0; None elsewhere, and where nobody waits for anybody."""
        ...

    def tell(self, phase: Callable[[str, bool], None]) -> None:
        """From now on say what this rank turns to, and whether there it waits for others."""
        ...


class SingleEngine:
    """One process has it all."""

    def __init__(
        self, model: Transformer, optimizer: Optimizer, device: torch.device, *, asynchronous: bool = False
    ) -> None:
        self.model, self.optimizer, self._device = model, optimizer, device
        self._asynchronous = asynchronous
        self._saver: AsyncSaver | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def gradients(self, batch: StepBatch, objective: Objective, alpha_L: Sequence[float]) -> StepSums:
        return accumulate_gradients(self.model, batch, objective, alpha_L)

    def gate_figures(self, sums: StepSums) -> list[RouterMetrics]:
        return [router_metrics(routing, sums.last.valid_T) for routing in sums.routings]

    def expert_biases(self) -> Mapping[int, Tensor]:
        biases = (module.router.expert_bias for module in moe_modules(self.model))
        return {index: bias for index, bias in enumerate(biases) if bias is not None}

    def evaluate(self, held: Held, compute: torch.dtype | None) -> dict[str, Any]:
        return evaluate(self.model, held, compute=compute, device=self._device)

    def non_finite(self) -> list[str]:
        return [name for name, parameter in self.model.named_parameters() if not bool(parameter.isfinite().all())]

    def save(self, root: Path, step: int, document: Mapping[str, Any], keep: int) -> Path | None:
        tensors = {
            "model": {name: tensor.detach() for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.tensors(),
            "rng": rng_states(),
        }
        documents, layout = {"state": document}, {"world_size": 1}
        if not self._asynchronous:
            return save_generation(root, step, tensors=tensors, documents=documents, layout=layout, keep=keep)
        if self._saver is None:
            self._saver = AsyncSaver(root, single_mesh(Layout(stages=Split((0,))), self._device), keep=keep)
        self._saver.save(step, whole_pieces(tensors), documents, layout)
        return None

    def poll(self) -> Path | None:
        return self._saver.poll() if self._saver else None

    def finish(self) -> Path | None:
        return self._saver.flush() if self._saver else None

    def latest(self, root: Path) -> Generation | None:
        return latest_generation(root)

    def any_of(self, flag: bool) -> bool:
        return flag

    def timeline(self) -> Timeline | None:
        return None

    def tell(self, phase: Callable[[str, bool], None]) -> None:
        pass

    @torch.no_grad()
    def restore(self, generation: Generation) -> None:
        _restore_model(self.model, generation.tensors("model"), generation.path)
        state = generation.tensors("optimizer")  # many ranks keep a wider copy of narrow weights; one process does not
        self.optimizer.restore({name: tensor for name, tensor in state.items() if not name.endswith("/master")})
        restore_rng(generation.tensors("rng"))


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


def rng_states() -> dict[str, Tensor]:
    """torch's generator states, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """The inverse of `rng_states`; devices that are not here are passed over."""
    torch.set_rng_state(states["cpu"])
    for name, rng_state in states.items():
        device, _, index = name.partition(".")
        if device == "cuda" and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(rng_state, int(index))
