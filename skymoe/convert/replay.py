"""Do a plan: read, make, write, forget; one step at a time.

Memory is bounded by the largest step (`ConversionPlan.peak_bytes`), whatever the size of the model. The order of the
plan finishes one shard after another, and a finished shard stays finished: in the directory that a killed run left,
steps whose targets are all there are skipped, and their sources are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.log import logger
from skymoe.base.progress import Progress, progress
from skymoe.convert.apply import Make
from skymoe.convert.parents import Parent
from skymoe.convert.plan import ConversionPlan, Operation, Source, Target
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.writer import DEFAULT_SHARD_BYTES, ShardedWriter


@torch.no_grad()
def replay(
    plan: ConversionPlan,
    parents: Sequence[Parent],
    directory: Path,
    make: Make,
    *,
    name: str,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> tuple[Path, ...]:
    """Write the weights that `plan` describes into `directory`.

    Args:
        plan: what to do.
        parents: the sources, by their numbers.
        directory: exists; best a staging directory.
        make: performs the operations; `apply.make_common` for the common ones.
        name: of the work, for the progress bar.
        max_shard_bytes: most bytes in one weight file.

    Returns:
        The weight files.

    Raises:
        FormatError: a source is damaged. MachineError: no space, no permission.
    """
    tensors = [(target.name, target.dtype, target.shape) for target in plan.tensors]
    writer = ShardedWriter(directory, tensors, max_shard_bytes=max_shard_bytes, resume=True)
    kept = sum(target.num_bytes for target in plan.tensors if target.name in writer.done)
    if kept:
        logger.info("%s: %.2f GB were written by an earlier run and are kept", name, kept / 1e9)
    with writer, progress(name, plan.bytes_written / 1e9, "GB", done=kept / 1e9, speed=True) as bar:
        for step in plan.steps:
            targets = [target for target in step.targets if target.name not in writer.done]
            if targets:
                _do(step.operation, targets, parents, make, writer, bar)
    return writer.finish()


def _do(
    operation: Operation,
    targets: Sequence[Target],
    parents: Sequence[Parent],
    make: Make,
    writer: ShardedWriter,
    bar: Progress,
) -> None:
    """One step; its tensors are gone when it returns."""
    results = make(operation, lambda source: read_source(parents, source))
    alike: dict[tuple[int, DType, tuple[int, ...]], list[Target]] = {}
    for target in targets:
        alike.setdefault((target.slot, target.dtype, target.shape), []).append(target)
    for (slot, dtype, shape), copies in alike.items():
        tensor = results[slot].to(torch_dtype(dtype))
        writer.add_copies([target.name for target in copies], tensor if tensor.ndim else tensor.expand(shape))
        bar.advance(sum(target.num_bytes for target in copies) / 1e9)


def read_source(parents: Sequence[Parent], source: Source) -> Tensor:
    """The values of `source`, of `source.shape`."""
    reader = parents[source.parent].reader
    return reader.slice(source.name, *source.parts).view(source.shape) if source.parts else reader.tensor(source.name)
