"""PagedStore: the keys, or the values, of one layer in pages, in fp32, bf16 or e4m3 with a scale per token and head.

Storage is [G, slots, C]: slot = page * page_size + offset. With the heads outermost, gathering pages gives each head a
contiguous matrix, and nothing has to be turned round.

FP8: the scale of a vector of C numbers is its largest |x| over 448, fp32; C + 4 bytes per token and head. Codes are
encoded by torch's cast from fp32, which is fast, and decoded by shift and mask (ops/fp8.py). A vector that holds NaN or
infinity has such a scale, and reads back as NaN: it spoils the answer it belongs to, visibly, and no other.

Shapes: N rows of the step, G key/value heads, C head width, P pages, S tokens of those pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.ops.fp8 import E4M3_MAX

_FP16_TO_E4M3 = 256.0


class PagedStore:
    """`num_pages` pages of `page_size` vectors per head.

    Args:
        num_heads, num_pages, page_size, head_dim: sizes; there may be no heads.
        dtype: float32, bfloat16 or float8_e4m3fn.
        device: where.
    """

    def __init__(
        self, num_heads: int, num_pages: int, page_size: int, head_dim: int, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        is_fp8 = dtype == torch.float8_e4m3fn
        shape = (num_heads, num_pages * page_size, head_dim)
        self.page_size = page_size
        self._data_GSC = torch.zeros(shape, dtype=torch.int8 if is_fp8 else dtype, device=device)
        self._scale_GS = torch.zeros(shape[:2], device=device) if is_fp8 else None

    @property
    def num_heads(self) -> int:
        """Heads of this rank."""
        return len(self._data_GSC)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self._data_GSC.nbytes + (0 if self._scale_GS is None else self._scale_GS.nbytes)

    def write(self, x_NGC: Tensor, slots_N: Tensor) -> None:
        """Put row i into slot `slots_N[i]`; the slots are different."""
        x_GNC = x_NGC.transpose(0, 1)
        if self._scale_GS is not None:
            x_GNC = x_GNC.float()
            largest_GN = x_GNC.abs().amax(-1) if x_GNC.numel() else x_GNC.new_zeros(x_GNC.shape[:2])
            scale_GN = torch.where(largest_GN == 0, 1.0, (largest_GN / E4M3_MAX).clamp(min=2.0**-126))
            self._scale_GS.index_copy_(1, slots_N, scale_GN)
            scaled = (x_GNC / scale_GN[..., None]).clamp_(-E4M3_MAX, E4M3_MAX)
            x_GNC = scaled.to(torch.float8_e4m3fn).view(torch.int8)
        self._data_GSC.index_copy_(1, slots_N, x_GNC.to(self._data_GSC.dtype))

    def read(self, pages_P: Tensor) -> Tensor:
        """The vectors in these pages, one page after the other, (G, P * page_size, C) in fp32."""
        x_GSC = self._gather(self._data_GSC, pages_P)
        if self._scale_GS is None:
            return x_GSC.float()
        wide_GSC = x_GSC.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        scale_GS1 = self._gather(self._scale_GS[..., None], pages_P) * _FP16_TO_E4M3
        return wide_GSC.view(torch.float16).float().mul_(scale_GS1)

    def _gather(self, data_GSC: Tensor, pages_P: Tensor) -> Tensor:
        groups, _, width = data_GSC.shape
        pages_GPSC = data_GSC.view(groups, data_GSC.shape[1] // self.page_size, self.page_size, width)
        return pages_GPSC.index_select(1, pages_P).view(groups, len(pages_P) * self.page_size, width)
