"""Attention over keys and values that lie in pages.

A page holds `page_size` consecutive tokens of one sequence; a sequence is a list of pages. A step computes some rows of
some sequences: one row of a sequence that decodes, more of a prompt that is being read. A row at position p sees the
keys at 0 .. p, or the last `window` of them.

Storage is [G, slots, C]: slot = page * page_size + offset. With the heads outermost, gathering pages gives each head a
contiguous matrix, and nothing has to be turned round.

Shapes: N rows of the step, H query heads, G key/value heads, C head width, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedChunk:
    """Rows of one sequence: first row in the step, how many, position of the first, pages (int64) of the sequence."""

    row: int
    num_rows: int
    start: int
    pages: Tensor


@dataclass(frozen=True)
class PagedBatch:
    """One step as the cache sees it.

    Attributes:
        positions_N: int64 position of each row in its sequence.
        slots_N: int64 slot where its keys and values go.
        chunks: the sequences, in the order of their rows.
        page_size: tokens of a page.
    """

    positions_N: Tensor
    slots_N: Tensor
    chunks: tuple[PagedChunk, ...]
    page_size: int

    @classmethod
    def of(
        cls, chunks: Sequence[tuple[int, int, Sequence[int]]], page_size: int, device: torch.device | str = "cpu"
    ) -> PagedBatch:
        """From (number of rows, position of the first, pages) of each sequence."""
        made: list[PagedChunk] = []
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        row = 0
        for num_rows, start, pages in chunks:
            pages_ = torch.tensor(pages, dtype=torch.int64)
            at = torch.arange(start, start + num_rows)
            positions.append(at)
            slots.append(pages_[at // page_size] * page_size + at % page_size)
            made.append(PagedChunk(row, num_rows, start, pages_.to(device)))
            row += num_rows
        empty = [torch.empty(0, dtype=torch.int64)]
        return cls(
            torch.cat(positions or empty).to(device), torch.cat(slots or empty).to(device), tuple(made), page_size
        )


def reference_attention(
    q_NHC: Tensor, k_GSC: Tensor, v_GSC: Tensor, batch: PagedBatch, kv_of_head: Sequence[int],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """The same as `paged_attention`, one row and head after another: the specification."""
    out_NHC = torch.empty_like(q_NHC)
    for chunk in batch.chunks:
        for i in range(chunk.num_rows):
            end = chunk.start + i + 1
            at = torch.arange(0 if window is None else max(0, end - window), end, device=chunk.pages.device)
            slots = chunk.pages[at // batch.page_size] * batch.page_size + at % batch.page_size
            for head, group in enumerate(kv_of_head):
                k_SC, v_SC = k_GSC[group, slots].float(), v_GSC[group, slots].float()
                q_C = q_NHC[chunk.row + i, head].float()
                out_NHC[chunk.row + i, head] = (k_SC @ q_C * q_C.numel() ** -0.5).softmax(0) @ v_SC
    return out_NHC
