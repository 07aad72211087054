"""PagedCache: the keys and values of all layers of one rank, in pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skymoe.engine.step import StepPlan
from skymoe.ops.paged import PagedBatch, reference_attention


def paged_batch(step: StepPlan, page_size: int, device: torch.device | str = "cpu") -> PagedBatch:
    """What the cache needs to know of a step: made once, used in every layer."""
    return PagedBatch.of([(len(chunk.tokens), chunk.start, chunk.pages) for chunk in step.chunks], page_size, device)


def bytes_per_token(kv_heads_per_layer: Sequence[int], head_dim: int, kv_dtype: torch.dtype) -> int:
    """Bytes that one token takes in the caches of all layers."""
    of_head = head_dim * kv_dtype.itemsize + (4 if kv_dtype == torch.float8_e4m3fn else 0)
    return 2 * sum(kv_heads_per_layer) * of_head


class PagedCache:
    """Keys and values by layer, head and slot.

    Args:
        kv_heads_per_layer: key/value heads of this rank; a layer may have none.
        num_pages, page_size, head_dim: sizes.
        kv_dtype: float32, bfloat16 or float8_e4m3fn (with one fp32 scale per token and head).
        device: where.
    """

    def __init__(
        self, kv_heads_per_layer: Sequence[int], num_pages: int, page_size: int, head_dim: int, kv_dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.page_size = page_size
        slots = num_pages * page_size
        self._k = [torch.zeros(heads, slots, head_dim, dtype=kv_dtype, device=device) for heads in kv_heads_per_layer]
        self._v = [torch.zeros_like(k) for k in self._k]

    def write(self, layer: int, k_NGC: Tensor, v_NGC: Tensor, slots_N: Tensor) -> None:
        """Put the keys and values of a step into their slots; before `attend`."""
        self._k[layer].index_copy_(1, slots_N, k_NGC.transpose(0, 1).to(self._k[layer].dtype))
        self._v[layer].index_copy_(1, slots_N, v_NGC.transpose(0, 1).to(self._v[layer].dtype))

    def attend(
        self, layer: int, q_NHC: Tensor, batch: PagedBatch, *, kv_of_head: Sequence[int] | None = None,
        window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(q k^T / sqrt(C)) v of each row over the keys of its sequence up to itself, in the dtype of `q_NHC`.

        Args:
            layer: number of the layer.
            q_NHC: queries of the step's rows; H may be 0.
            batch: the step.
            kv_of_head: which of this rank's key/value heads each query head reads; None: H/G consecutive heads each.
            window: a row sees the last `window` positions, itself included.
        """
        num_heads, groups = q_NHC.shape[1], len(self._k[layer])
        if kv_of_head is None:
            assert not num_heads or num_heads % groups == 0, "say which key/value head each query head reads"
            kv_of_head = [head * groups // num_heads for head in range(num_heads)]
        return reference_attention(q_NHC, self._k[layer], self._v[layer], batch, kv_of_head, window)
