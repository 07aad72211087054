"""What a rank needs beside what the model says: constants, few, each with its origin.

    context          1.0 GB  CUDA context, kernels, library workspaces, before the first tensor
    communicator     0.4 GB  buffers of one group of ranks that exchange data
    fragmentation    2 %     of the GPU's memory: blocks that the allocator holds and cannot use

The sum on an 80 GB GPU with four groups is 4.2 GB; public notes of large runs keep 4 to 6 GB free. What frameworks
print as peak memory is the allocator's count and has none of it: compare that with `RankMemory.allocated`.
"""

from __future__ import annotations

from skymoe.plan.work import Work

CONTEXT_BYTES = 1.0e9
COMMUNICATOR_BYTES = 0.4e9
FRAGMENTATION = 0.02


def reserve_bytes(work: Work) -> float:
    """Of one rank; nothing where the processor's memory is the machine's."""
    gpu, division = work.cluster.gpu, work.division
    if gpu.name.startswith("cpu"):
        return 0.0
    groups = sum(ranks > 1 for ranks in (division.pp, division.tp, division.cp, division.dp, division.ep))
    return CONTEXT_BYTES + groups * COMMUNICATOR_BYTES + FRAGMENTATION * gpu.memory
