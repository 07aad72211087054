"""Every initial weight, in one function.

A tensor's values depend on the seed and its name alone, and the name carries the *global* layer id; an expert's
values depend on its own index. So any rank of any layout can draw the part it owns and gets what a single process
would have drawn.

Rule: N(0, init_std); the projections that write into the residual stream (attention `o`, feed-forward `down`) are
divided by sqrt(2 L), as in GPT-2, so that the stream's variance does not grow with depth. Norms are 1, biases 0.
"""

from __future__ import annotations

import hashlib
import math
from itertools import chain

import torch
from torch import Tensor

from skymoe.model.transformer import Transformer
from skymoe.spec.model import ModelSpec


def initial_tensor(
    spec: ModelSpec, name: str, shape: torch.Size | tuple[int, ...], seed: int, *, first_expert: int = 0
) -> Tensor:
    """The fp32 initial value of the parameter `name` (module name, global layer id) of a model.

    Stacked experts are drawn from `first_expert` on, as many as `shape` says: a rank draws just those it owns.
    """
    parts = name.split(".")
    if parts[-1] in ("bias", "expert_bias"):
        return torch.zeros(shape)
    if any(part.endswith("norm") for part in parts):
        return torch.ones(shape)
    std = spec.init_std / math.sqrt(2 * spec.num_layers) if {"o", "down"} & set(parts) else spec.init_std
    if "experts" in parts:
        experts = range(first_expert, first_expert + shape[0])
        return torch.stack([_normal(tuple(shape[1:]), std, seed, f"{name}.{e}") for e in experts])
    return _normal(tuple(shape), std, seed, name)


def _normal(shape: tuple[int, ...], std: float, seed: int, key: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> Transformer:
    """Fill every parameter and buffer of `model` in place and return it."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        tensor.copy_(initial_tensor(model.spec, name, tensor.shape, seed))
    return model
