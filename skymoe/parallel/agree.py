"""Joint decisions: what one rank knows, all ranks do.

A signal reaches one rank, a disk fills on one machine, a loss is NaN where its tokens are: if one rank then leaves the
common path, the others wait for it until the time-out. So whoever may leave asks here first, every rank at the same
place, and all get the same answer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from skymoe.parallel.mesh import Group

_LONGEST = 2000  # bytes of a reason that travel

_CPU = torch.device("cpu")


def any_of(flag: bool, group: Group, device: torch.device = _CPU) -> bool:
    """Whether `flag` is set on any rank of `group`; one all-reduce of one number.

    Args:
        flag: of this rank.
        group: who decides; every rank of it calls.
        device: of the number; that of the mesh (NCCL knows no other).
    """
    if group.handle is None:
        return flag
    number = torch.tensor([int(flag)], dtype=torch.int64, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=group.handle)
    return bool(number.item())


def agree(ok: bool, reason: str, group: Group, device: torch.device = _CPU) -> str | None:
    """None when all ranks of `group` are `ok`; otherwise the reason of the first that is not, on every rank.

    The reason travels only when there is one: all ranks know that from the first exchange.
    """
    if group.handle is None:
        return None if ok else reason
    first = torch.tensor([group.size if ok else group.rank], dtype=torch.int64, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group.handle)
    speaker = int(first.item())
    if speaker == group.size:
        return None
    words = reason.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    text = torch.tensor(list(words), dtype=torch.uint8, device=device)
    dist.broadcast(text, group.ranks[speaker], group=group.handle)
    return bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
