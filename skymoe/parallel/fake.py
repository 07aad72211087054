"""A world of any size in one process: groups are made as in the real one, what is sent arrives nowhere.

For a dry run on meta tensors. torch's own tests use the same backend; values that come out of its collectives mean
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Within the block this process is `rank` of `world_size`. There must be no process group yet."""
    assert not dist.is_initialized(), "a fake world in a process that already is part of a real one"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
