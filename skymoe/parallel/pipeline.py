"""The pipeline: forward and backward of all micro-batches of a step through the stages of this rank and its neighbours.

    pipeline = Pipeline(stages, mesh, num_micro=8, rows=N, hidden_size=D, dtype=torch.float32)
    losses = pipeline.train(micros, forward, loss)      # on the owner of the last stage; [] on the others

`forward(stage, x_ND, micro)` is the caller's: on stage 0 `x_ND` is None and the tokens come from the micro-batch, on
the others it is what the stage before returned. Micro-batches are any objects; only `x_ND` travels, always as (rows, D)
in `dtype`. Gradients are summed into `.grad` and not scaled: the loss of a micro-batch has to be its share of the
loss of the step.

torch.distributed.pipelining runs the schedule: 1f1b, interleaved, or zbv. Evaluation goes forward only and takes any
number of micro-batches (parallel/rounds.py). In a pipeline of one rank there is nothing to schedule and no process
group: a plain loop.

After an exception (in `forward`, `loss`, a backward pass or a callback; it is raised as it was) neighbours still wait
for tensors: the step cannot be taken up again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from skymoe.ops.deferred import DeferredWeights
from skymoe.parallel.clock import Clock
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.rounds import forward_rounds
from skymoe.parallel.stage import Stage, StageHooks
from skymoe.plan.orders import check_micro_batches
from skymoe.spec.layout import ScheduleKind

M = TypeVar("M")
Forward = Callable[[int, Tensor | None, M], Tensor]
Loss = Callable[[Tensor, M], Tensor]


def _nothing(stage: int) -> None:
    """A callback that nobody wants."""


class Pipeline(Generic[M]):
    """All stages of this rank's pipeline, run together with the neighbours' of the group `mesh.pp`.

    Args:
        stages: of this rank, `layout.stages_of(pp)`.
        mesh: the groups.
        num_micro: micro-batches per training step, the same on all ranks.
        rows: of the tensor between stages on this rank (the same on all stages of one pipeline).
        hidden_size: its columns.
        dtype: its type.
        before_stage: called with a stage before its first forward in a training step.
        after_stage: called with a stage as soon as its last gradient of the step is complete, weight gradients
            included. What it does may wait for ranks that own the same stage (tp, dp), never for other stages: those
            may be waiting for this rank.
        deferred: per stage, where its weight gradients are put off to (`parallel/deferred.py`); used under zbv. A stage
            that is not in it forms them together with the gradient of its input.

    Attributes:
        clock: what this rank did when, in the last training step.
    """

    def __init__(
        self,
        stages: Sequence[int],
        mesh: Mesh,
        *,
        num_micro: int,
        rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        before_stage: Callable[[int], None] = _nothing,
        after_stage: Callable[[int], None] = _nothing,
        deferred: Mapping[int, DeferredWeights] | None = None,
    ) -> None:
        check_micro_batches(mesh.layout, num_micro)
        assert tuple(stages) == mesh.layout.stages_of(mesh.coordinate.pp)
        self._mesh, self._num_micro = mesh, num_micro
        self._boundary = torch.empty(rows, hidden_size, dtype=dtype, device="meta", requires_grad=True)
        self._running = _Running[M]()
        self.clock = Clock(mesh.rank, mesh.device)
        self._hooks = {
            stage: StageHooks(before_stage, after_stage, self.clock, (deferred or {}).get(stage)) for stage in stages
        }
        self._stages: list[Stage] = []
        if mesh.layout.pp > 1:
            self._schedule = self._build_schedule()

    def train(self, micros: Sequence[M], forward: Forward[M], loss: Loss[M]) -> list[Tensor]:
        """Forward and backward of `num_micro` micro-batches.

        Returns:
            The loss of each, detached, where the last stage is; nothing on the other ranks.
        """
        assert len(micros) == self._num_micro
        self.clock.begin()
        losses = (
            self._train_scheduled(micros, forward, loss) if self._stages else self._train_here(micros, forward, loss)
        )
        self.clock.end()
        return [value.detach() for value in losses]

    @torch.no_grad()
    def evaluate(
        self, micros: Sequence[M], forward: Forward[M], loss: Loss[M], *, rows: int | None = None
    ) -> list[Tensor]:
        """Forward of any number of micro-batches, without gradients, callbacks and clock.

        Args:
            micros, forward, loss: as in `train`.
            rows: of the tensor between stages, where these micro-batches have other sizes than those of training.

        Returns:
            The loss of each where the last stage is; nothing on the other ranks.
        """
        boundary = self._boundary if rows is None else self._boundary.new_empty(rows, self._boundary.shape[1])
        return forward_rounds(self._mesh, micros, forward, loss, boundary)

    def _train_scheduled(self, micros: Sequence[M], forward: Forward[M], loss: Loss[M]) -> list[Tensor]:
        losses: list[Tensor] = []
        index = torch.arange(len(micros))
        for stage in self._stages:
            stage.start()
        with self._running.of(micros, forward, loss):
            self._schedule.step(micro=index, target=index, losses=losses, return_outputs=False)
        for stage in self._stages:
            for work in stage.sent:
                work.wait()
        return losses

    def _train_here(self, micros: Sequence[M], forward: Forward[M], loss: Loss[M]) -> list[Tensor]:
        """All stages are here: one micro-batch after the other, forward through all stages and back."""
        losses = []
        for number, micro in enumerate(micros):
            inputs: dict[int, Tensor | None] = {}
            outputs: dict[int, Tensor] = {}
            x_ND: Tensor | None = None
            for stage, hooks in self._hooks.items():
                if number == 0:
                    hooks.before(stage)
                start = self.clock.start(stage, "F", number)
                inputs[stage] = None if x_ND is None else x_ND.detach().requires_grad_()
                outputs[stage] = x_ND = forward(stage, inputs[stage], micro)
                self.clock.add(stage, "F", number, start)
            assert x_ND is not None
            losses.append(loss(x_ND, micro))
            self.clock.prolong()
            outputs[stage] = losses[-1]
            self._backward_here(number, inputs, outputs)
        return losses

    def _backward_here(self, number: int, inputs: dict[int, Tensor | None], outputs: dict[int, Tensor]) -> None:
        gradient: Tensor | None = None
        for stage, hooks in reversed(self._hooks.items()):
            start = self.clock.start(stage, "B", number)
            torch.autograd.backward(outputs.pop(stage), gradient)
            if hooks.deferred is not None:
                hooks.deferred.take()()
            self.clock.add(stage, "B", number, start)
            x_ND = inputs.pop(stage)
            gradient = None if x_ND is None else x_ND.grad
            if number == self._num_micro - 1:
                hooks.after(stage)

    def _build_schedule(self) -> Any:
        layout, group = self._mesh.layout, self._mesh.pp.handle
        assert group is not None
        splits_backward = layout.schedule is ScheduleKind.ZERO_BUBBLE
        self._stages = [
            Stage(
                _Adapter(self._running, stage, self._boundary, is_last=stage == layout.num_stages - 1), stage,
                layout.num_stages, boundary=self._boundary, device=self._mesh.device, group=group, hooks=hooks,
                splits_backward=splits_backward,
            )
            for stage, hooks in self._hooks.items()
        ]  # fmt: skip
        # On an exception torch writes the whole schedule to the log; the exception says enough.
        logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
        if layout.schedule is ScheduleKind.ONE_F_ONE_B:
            return Schedule1F1B(self._stages[0], self._num_micro, self._loss, scale_grads=False)
        if layout.schedule is ScheduleKind.INTERLEAVED:
            return ScheduleInterleaved1F1B(list(self._stages), self._num_micro, self._loss, scale_grads=False)
        return ScheduleZBVZeroBubble(list(self._stages), self._num_micro, self._loss, scale_grads=False)

    def _loss(self, y_ND: Tensor, micro: Tensor) -> Tensor:
        value = self._running.loss(y_ND, self._running.micros[int(micro)])
        self.clock.prolong()
        return value


class _Running(Generic[M]):
    """What the caller gave for the step that is running; nothing is held between steps."""

    def __init__(self) -> None:
        self.micros: Sequence[M] = ()

    @contextmanager
    def of(self, micros: Sequence[M], forward: Forward[M], loss: Loss[M]) -> Iterator[None]:
        self.micros, self.forward, self.loss = micros, forward, loss
        try:
            yield
        except RuntimeError as error:
            # Of what a stage raises, forward or backward, torch tells where; the true error is its cause, and says
            # which rank is gone, or that memory ran out.
            if "ailed to run " in str(error) and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        finally:
            self.micros = ()
            del self.forward, self.loss


class _Adapter(nn.Module):
    """torch's schedules cut tensors into micro-batches. They cut a range of numbers here: the places in `micros`."""

    def __init__(self, running: _Running[Any], stage: int, boundary: Tensor, *, is_last: bool) -> None:
        super().__init__()
        self._running, self._stage, self._boundary, self._is_last = running, stage, boundary, is_last

    def forward(self, x_ND: Tensor | None = None, *, micro: Tensor) -> Tensor:
        y_ND = self._running.forward(self._stage, x_ND, self._running.micros[int(micro)])
        if self._is_last:
            return y_ND
        assert y_ND.shape == self._boundary.shape and y_ND.dtype == self._boundary.dtype, (y_ND.shape, y_ND.dtype)
        return y_ND.contiguous()
