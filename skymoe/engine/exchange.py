"""What ranks tell each other within a step: sums, logits, and the plan of the step. Nothing of torch's is global here.

An engine may live in a process that is not its own (`skymoe.LLM` in a user's program), which may have a world of
torch.distributed for other things, or two engines. So nothing here is registered anywhere: an `Exchange` owns two
backends of its own, connected over the loopback interface.

- **Sums** are formed here, in the order of the ranks and in fp32, not by the backend: every rank has the same bits, and
  a row's sum does not depend on where it stands in the batch (the rings of gloo and NCCL begin at another rank for
  another part of the tensor). Few numbers go to everybody at once, which is one message each; many are first divided,
  so that no rank is sent more than twice what it has.
- **Plans** travel apart from the rest (`control`): between two steps the others wait as long as nobody asks anything,
  while in a step, and for rank 0 always, silence means that somebody is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from skymoe.spec.split import Split

_FEW_BYTES = 1 << 16  # up to here one message to everybody is quicker than two rounds
_FIRST_WORDS = 256  # of a plan; a longer one needs a second message
_FOREVER = timedelta(days=3650)
_STOP = -1


class Exchange:
    """The ranks of one engine, as one of them sees them.

    Args:
        rank, size: this one, and how many.
        store: where they meet; None for a single rank.
        timeout_s: how long a rank may keep the others waiting within a step.
        device: of the tensors that are summed; "cuda" ranks talk by NCCL.
    """

    def __init__(
        self, rank: int, size: int, store: dist.Store | None, *, timeout_s: float = 60.0,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.rank, self.size = rank, size
        self._data: Any = None  # torch's stubs know the backends, but not what they can do
        self._control: Any = None
        if size == 1:
            return
        assert store is not None
        self._limit = limit = timedelta(seconds=timeout_s)
        self._control = _gloo(dist.PrefixStore("control", store), rank, size, limit)
        if torch.device(device).type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._data = dist.ProcessGroupNCCL(dist.PrefixStore("data", store), rank, size, options)
        else:
            self._data = _gloo(dist.PrefixStore("data", store), rank, size, limit)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each, in the dtype of `x`."""
        if self._data is None:
            return x
        flat = x.reshape(-1)
        if flat.numel() * flat.itemsize <= _FEW_BYTES:
            return _in_order(self._gather(flat), x.dtype).view(x.shape)
        part = -(-flat.numel() // self.size)
        padded = F.pad(flat, (0, part * self.size - flat.numel()))
        heard = torch.empty_like(padded)
        self._data.alltoall_base(heard, padded, [], []).wait()
        own = _in_order(heard.view(self.size, part), x.dtype)
        return self._gather(own).view(-1)[: flat.numel()].view(x.shape)

    def gather_columns(self, x_RV: Tensor, columns: Split) -> Tensor | None:
        """Columns of all ranks side by side on rank 0; None on the others. Rank r has `columns.sizes[r]`."""
        if self._data is None:
            return x_RV
        rows = x_RV.shape[0]
        own = x_RV.reshape(-1).contiguous()  # one column of a wider tensor is no row of memory
        sizes = [size * rows if self.rank == 0 else 0 for size in columns.sizes]
        heard = x_RV.new_empty(sum(sizes))
        self._data.alltoall_base(heard, own, sizes, [len(own)] + [0] * (self.size - 1)).wait()
        if self.rank:
            return None
        return torch.cat([part.view(rows, -1) for part in heard.split(sizes) if len(part)], 1)

    def least(self, number: int) -> int:
        """The smallest number that a rank has said."""
        if self._control is None:
            return number
        return min(self.gathered(number))

    def gathered(self, number: int) -> list[int]:
        """What each rank has said."""
        if self._control is None:
            return [number]
        heard = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._control.allgather([heard], [torch.tensor([number])]).wait()
        return [int(word) for word in heard]

    def send_plan(self, row: Sequence[int]) -> None:
        """Rank 0: tell the others what to run next."""
        if self._control is None:
            return
        first = torch.zeros(1 + _FIRST_WORDS, dtype=torch.int64)
        words = torch.tensor(row, dtype=torch.int64)
        first[0] = len(words)
        first[1 : 1 + min(len(words), _FIRST_WORDS)] = words[:_FIRST_WORDS]
        self._broadcast(first)
        if len(words) > _FIRST_WORDS:
            self._broadcast(words[_FIRST_WORDS:].contiguous())

    def send_stop(self) -> None:
        """Rank 0: tell the others that nothing will follow."""
        if self._control is not None:
            first = torch.zeros(1 + _FIRST_WORDS, dtype=torch.int64)
            first[0] = _STOP
            self._broadcast(first)

    def hear_plan(self) -> list[int] | None:
        """Any other rank: wait for what rank 0 says, for as long as it takes; None is the end."""
        first = torch.zeros(1 + _FIRST_WORDS, dtype=torch.int64)
        self._broadcast(first)
        length = int(first[0])
        if length == _STOP:
            return None
        words = first[1 : 1 + min(length, _FIRST_WORDS)]
        if length > _FIRST_WORDS:
            rest = torch.zeros(length - _FIRST_WORDS, dtype=torch.int64)
            self._broadcast(rest)
            words = torch.cat((words, rest))
        plan: list[int] = words.tolist()
        return plan

    def _broadcast(self, words: Tensor) -> None:
        assert self._control is not None
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = self._limit if self.rank == 0 else _FOREVER
        self._control.broadcast([words], options).wait()

    def _gather(self, flat: Tensor) -> Tensor:
        """(size, numel): what each rank has."""
        assert self._data is not None
        heard = flat.new_empty(self.size, flat.numel())
        self._data.allgather([list(heard)], [flat.contiguous()]).wait()
        return heard


def _in_order(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over dim 0, first to last, in fp32 for narrower numbers."""
    total = parts[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def _gloo(store: dist.Store, rank: int, size: int, limit: timedelta) -> Any:
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = limit
    options._devices = [backend.create_device(hostname="127.0.0.1")]  # never another interface
    return backend(store, rank, size, options)
