"""What the attention layers of one forward pass share: rotary tables, masks, cache.

Shapes: B batch, T tokens, C head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.model.batch import BatchInfo, KVCache
from skymoe.ops.attention import attention_mask
from skymoe.ops.rotary import inverse_frequencies, rotary_tables
from skymoe.spec.model import ModelSpec, RopeScaling, RopeSpec


class AttentionInputs(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        cos, sin: rotary tables, (B or 1, 1, T, C/2).
        masks: attention mask by window (see `ops.attention.attention_mask`).
        cache: keys and values so far, or None.
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None]
    cache: KVCache | None


def attention_inputs(
    spec: ModelSpec, num_tokens: int, batch: BatchInfo, cache: KVCache | None, device: torch.device
) -> AttentionInputs:
    """Positions and masks for `num_tokens` tokens a row, after those in the cache.

    Raises:
        SkymoeError: they do not fit the cache.
    """
    past = cache.length if cache else 0
    if cache is not None:
        cache.check_room(num_tokens)
    positions_BT = batch.positions_BT
    if positions_BT is None:
        positions_BT = torch.arange(past, past + num_tokens, device=device)[None]
    length = int(positions_BT.max()) + 1 if spec.rope.scaling is RopeScaling.DYNAMIC else 0
    frequencies, factor = _frequencies(spec.rope, spec.head_dim, spec.max_position, length)
    cos, sin = rotary_tables(frequencies.to(device), factor, positions_BT)
    masks = {
        window: attention_mask(
            num_tokens, past + num_tokens, window=window, document_ids_BT=batch.document_ids_BT, device=device
        )
        for window in {spec.window(layer) for layer in range(spec.num_layers)}
    }
    return AttentionInputs(cos, sin, masks, cache)


@lru_cache(maxsize=32)
def _frequencies(rope: RopeSpec, head_dim: int, max_position: int, length: int) -> tuple[Tensor, float]:
    with torch.device("cpu"), torch.inference_mode(False):
        return inverse_frequencies(rope, head_dim, max_position, length)
