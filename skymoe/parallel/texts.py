"""Bytes between ranks: JSON in uint8 tensors. Nothing that travels can run code."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.parallel.mesh import Group


def gather_bytes(data: bytes, group: Group, device: torch.device) -> list[bytes]:
    """What every rank of `group` gives, by its place, on the first of them; an empty list on the others."""
    if group.handle is None:
        return [data]
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in group.ranks]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device), group=group.handle)
    counts = [int(size.item()) for size in sizes]
    padded = _tensor(data.ljust(max(*counts, 1), b"\0"), device)
    found = [torch.empty_like(padded) for _ in group.ranks] if group.rank == 0 else None
    dist.gather(padded, found, dst=group.ranks[0], group=group.handle)
    return [_bytes(one)[:count] for one, count in zip(found or [], counts, strict=False)]


def broadcast_bytes(data: bytes, group: Group, device: torch.device) -> bytes:
    """What the first rank of `group` gives, on every rank; the others give anything."""
    if group.handle is None:
        return data
    size = torch.tensor([len(data)], dtype=torch.int64, device=device)
    dist.broadcast(size, group.ranks[0], group=group.handle)
    text = _tensor(data, device) if group.rank == 0 else torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    if size.item():
        dist.broadcast(text, group.ranks[0], group=group.handle)
    return _bytes(text)


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else torch.empty(0, device=device)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
