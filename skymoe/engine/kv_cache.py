"""PagedCache: the keys and values of all layers of one rank, in pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skymoe.engine.step import StepPlan
from skymoe.ops.paged import PagedBatch, paged_attention
from skymoe.ops.paged_store import PagedStore


def paged_batch(step: StepPlan, page_size: int, device: torch.device | str = "cpu") -> PagedBatch:
    """What the cache needs to know of a step: made once, used in every layer."""
    return PagedBatch.of([(len(chunk.tokens), chunk.start, chunk.pages) for chunk in step.chunks], page_size, device)


def bytes_per_token(kv_heads_per_layer: Sequence[int], head_dim: int, kv_dtype: torch.dtype) -> int:
    """Bytes that one token takes in the caches of all layers."""
    of_head = head_dim * kv_dtype.itemsize + (4 if kv_dtype == torch.float8_e4m3fn else 0)
    return 2 * sum(kv_heads_per_layer) * of_head


class PagedCache:
    """Keys and values by layer.

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
        self.num_pages, self.page_size = num_pages, page_size
        self._keys, self._values = (
            [PagedStore(heads, num_pages, page_size, head_dim, kv_dtype, device) for heads in kv_heads_per_layer]
            for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        """Memory taken: `bytes_per_token` times pages times the tokens of a page."""
        return sum(store.num_bytes for store in (*self._keys, *self._values))

    def write(self, layer: int, k_NGC: Tensor, v_NGC: Tensor, slots_N: Tensor) -> None:
        """Put the keys and values of a step into their slots, `PagedBatch.slots_N`; before `attend`."""
        self._keys[layer].write(k_NGC, slots_N)
        self._values[layer].write(v_NGC, slots_N)

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
        keys, values, num_heads = self._keys[layer], self._values[layer], q_NHC.shape[1]
        if kv_of_head is None:
            assert not num_heads or num_heads % keys.num_heads == 0, "say which key/value head each query head reads"
            kv_of_head = [head * keys.num_heads // num_heads for head in range(num_heads)]
        return paged_attention(q_NHC, keys, values, batch, tuple(kv_of_head), window)
