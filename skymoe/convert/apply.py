"""How the operations that all jobs share are done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skymoe.convert.plan import Copy, Operation, Source, Zeros
from skymoe.weights.buffers import torch_dtype

Read = Callable[[Source], Tensor]
Make = Callable[[Operation, Read], tuple[Tensor, ...]]


def make_common(operation: Operation, read: Read) -> tuple[Tensor, ...]:
    """The results of `Copy` and `Zeros`, one per slot."""
    match operation:
        case Copy(source, scale):
            tensor = read(source)
            return (tensor if scale == 1.0 else (tensor.float() * scale).to(torch_dtype(source.dtype)),)
        case Zeros():
            return (torch.zeros(()),)  # the replay expands it
    raise AssertionError(f"nobody performs {type(operation).__name__}")
