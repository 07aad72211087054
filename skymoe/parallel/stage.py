"""One stage of the pipeline as torch's schedules run it.

torch decides when a stage runs forward and backward and moves tensors between stages (torch.distributed.pipelining).
This subclass adds what a training step needs around that:

- tasks are timed (`Clock`), and `before` and `after` are called at the first forward and the last gradient of a step;
- buffers for received tensors live from the receive to the end of the task, not for the whole run and every
  micro-batch;
- the shapes between stages are given, not found out by an extra forward and backward in the first step.

Only methods that the schedules call are overridden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from skymoe.ops.deferred import DeferredWeights
from skymoe.parallel.clock import Clock
from skymoe.spec.timeline import PassKind


@dataclass(frozen=True)
class StageHooks:
    """What is called around the tasks of a stage.

    Attributes:
        before: with the stage, before its first forward of a training step.
        after: with the stage, when the last of its gradients of the step is complete.
        clock: told of every task.
        deferred: where the stage puts its weight gradients off to; None for a whole backward.
    """

    before: Callable[[int], None]
    after: Callable[[int], None]
    clock: Clock
    deferred: DeferredWeights | None


class Stage(PipelineStage):
    """A stage with given shapes, measured times and callbacks.

    Args:
        module: called with the received tensor (none on the first stage) and `micro=`.
        boundary: a meta tensor in shape and dtype of what passes between stages.
        splits_backward: whether the schedule asks for input and weight gradients apart.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        num_stages: int,
        *,
        boundary: Tensor,
        device: torch.device,
        group: dist.ProcessGroup,
        hooks: StageHooks,
        splits_backward: bool,
    ) -> None:
        super().__init__(
            module,
            stage,
            num_stages,
            device,
            input_args=() if stage == 0 else (boundary,),
            output_args=(boundary,),
            group=group,
            # With a builder torch runs one ordinary backward instead of two partial ones.
            dw_builder=self._take_weight_gradients if splits_backward else None,
        )
        self._hooks = hooks
        self._forwards = self._backwards = 0
        self._complete = False
        self.sent: list[dist.Work] = []

    def start(self) -> None:
        """A step begins."""
        self._forwards = self._backwards = 0
        self._complete = False
        self.sent.clear()

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: dict[str, Any] | None = None, save_forward_output: bool = True
    ) -> Any:
        """Forward of one micro-batch."""
        if self._forwards == 0:
            self._hooks.before(self.stage_index)
        self._forwards += 1
        start = self._hooks.clock.start(self.stage_index, "F", fwd_chunk_id)
        output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        self._hooks.clock.add(self.stage_index, "F", fwd_chunk_id, start)
        _release(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Backward of one micro-batch: whole, or towards its input only."""
        kind: PassKind = "B" if full_backward else "I"
        start = self._hooks.clock.start(self.stage_index, kind, bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._hooks.clock.add(self.stage_index, kind, bwd_chunk_id, start)
        if isinstance(loss, Tensor):
            loss.detach_()  # torch keeps it to the end of the step; with its graph it would keep the stage's input too
        if not self.is_last:
            _release(self.grad_recv_info[bwd_chunk_id])
        if full_backward:
            self._count()
            if self._complete and not self._will_send_gradient():
                self._hooks.after(self.stage_index)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The weight gradients that were put off."""
        start = self._hooks.clock.start(self.stage_index, "W", bwd_chunk_id)
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._hooks.clock.add(self.stage_index, "W", bwd_chunk_id, start)
        self._count()
        if self._complete:
            self._hooks.after(self.stage_index)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive into a fresh buffer."""
        self._provide(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive into a fresh buffer."""
        if not self.is_last:
            self._provide(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The last gradient of a step leaves before `after` is called: its reader waits for nothing else.

        It is never fused with a receive: what follows it in every schedule is a receive of its own.
        """
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        if not self._complete or not ops:
            return ops
        self.sent = [op.op(op.tensor, group=op.group, tag=op.tag, group_dst=op.group_peer) for op in ops]
        self._hooks.after(self.stage_index)
        return []

    def _will_send_gradient(self) -> bool:
        return not self.is_first and self.stage_index_to_group_rank[self.stage_index - 1] != self.group_rank

    def _count(self) -> None:
        self._backwards += 1
        self._complete = self._backwards == self.chunks

    def _take_weight_gradients(self) -> Callable[[], None]:
        return self._hooks.deferred.take() if self._hooks.deferred is not None else _nothing

    def _provide(self, infos: Any) -> None:
        for info in infos:
            if not info.is_root_arg and info.buffer is None:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)


def _release(infos: Any) -> None:
    for info in infos:
        info.buffer = None


def _nothing() -> None:
    pass
