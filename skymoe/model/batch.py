"""What a forward pass is told about its tokens, and the key/value cache it may extend.

Both are arguments of forward. Nothing about the running batch is kept in a module or a global.

Shapes: B batch, T tokens, S cached tokens, G key/value heads, C head width, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.base.errors import SkymoeError
from skymoe.spec.model import ModelSpec


class BatchInfo(NamedTuple):
    """Facts about a batch of tokens; every field may be left out.

    Attributes:
        positions_BT: int64 positions; default 0..T-1, after the cache.
        document_ids_BT: int64; attention stays within equal ids. Default: one document per row.
        valid_BT: bool, False for pads: never routed, never counted. Attention does not look at it: causality hides
            trailing pads, others need a document id of their own.
        capacity: assignments an expert takes before it drops the rest (real capacity); None drops nothing.
    """

    positions_BT: Tensor | None = None
    document_ids_BT: Tensor | None = None
    valid_BT: Tensor | None = None
    capacity: int | None = None


class KVCache:
    """Keys and values of the tokens so far, one preallocated tensor each: (L, B, G, S, C).

    A forward pass that is given the cache appends its tokens to every layer and then advances `length` once.
    """

    def __init__(
        self,
        spec: ModelSpec,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (spec.num_layers, batch_size, spec.num_kv_heads, max_length, spec.head_dim)
        self.keys_LBGSC = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBGSC = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def check_room(self, num_tokens: int) -> None:
        """Raises SkymoeError when `num_tokens` more do not fit."""
        if self.length + num_tokens > self.max_length:
            raise SkymoeError(
                f"{self.length + num_tokens} tokens do not fit a cache of {self.max_length}",
                hint="shorten the prompt or generate fewer tokens",
            )

    def extend(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer; returns all keys and values so far, views of (B, G, S, C)."""
        end = self.length + k_BGTC.shape[2]
        self.keys_LBGSC[layer, :, :, self.length : end] = k_BGTC
        self.values_LBGSC[layer, :, :, self.length : end] = v_BGTC
        return self.keys_LBGSC[layer, :, :, :end], self.values_LBGSC[layer, :, :, :end]
