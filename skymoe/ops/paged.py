"""Attention over keys and values that lie in pages.

A page holds `page_size` consecutive tokens of one sequence; a sequence is a list of pages. A step computes some rows of
some sequences: one row of a sequence that decodes, more of a prompt that is being read. A row at position p sees the
keys at 0 .. p, or the last `window` of them.

A row's result has the same bits whatever else is in the step and however its prompt was cut. Keys come in blocks of a
fixed number, counted from position 0, and a running softmax (Milakov and Gimelshein 2018; FlashAttention) goes over
the blocks in order. A block in which a row sees nothing multiplies its sums by 1 and adds 0, exactly. Within a block
every product has one fixed inner length, rows padded to a multiple of `TILE` and columns of `WIDTH` (ops/invariant.py).
All of it is fp32.

Query heads that share a key/value head stand below one another as rows of one product. Which head shares which is free
(`kv_of_head`): where key/value heads are replicated, a rank may have three query heads of one and two of the next.

What a row does not see never counts, not even NaN or infinity: neither what another sequence left in slots that this
one has not written yet, nor a later token, whose row may go into a page that others share.

Shapes: N rows of the step, H query heads, G key/value heads, R query heads of one, C head width, T rows of a sequence,
U sequences, M = T R rows of a product, K keys of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops.invariant import TILE, WIDTH
from skymoe.ops.paged_store import PagedStore

_BLOCK = 128  # keys, rounded up to whole pages
_GATHERED = 1 << 20  # fp32 numbers of keys, or of scores, at a time
_NOTHING = -1e30  # the largest score of a row that has seen no key; finite, so that differences are


@dataclass(frozen=True)
class PagedChunk:
    """Rows of one sequence: first row in the step, how many, position of the first, pages of the sequence."""

    row: int
    num_rows: int
    start: int
    pages: tuple[int, ...]

    @property
    def end(self) -> int:
        """Keys that the last row sees, but for a window."""
        return self.start + self.num_rows


@dataclass(frozen=True)
class PagedGroup:
    """Sequences of as many rows each, longest first.

    Attributes:
        chunks: the sequences.
        pages_UP: their pages, int64, each filled up with page 0 to whole blocks of the longest.
        rows_UT: rows of the step, int64.
        positions_UT: where those rows stand, int64.
    """

    chunks: tuple[PagedChunk, ...]
    pages_UP: Tensor
    rows_UT: Tensor
    positions_UT: Tensor


@dataclass(frozen=True)
class PagedBatch:
    """One step as the cache sees it.

    Attributes:
        positions_N: position of each row in its sequence, int64.
        slots_N: where its keys and values go, int64.
        groups: the sequences by number of rows.
        page_size: tokens of a page.
    """

    positions_N: Tensor
    slots_N: Tensor
    groups: tuple[PagedGroup, ...]
    page_size: int

    @classmethod
    def of(
        cls, sequences: Sequence[tuple[int, int, Sequence[int]]], page_size: int, device: torch.device | str = "cpu"
    ) -> PagedBatch:
        """From (number of rows, position of the first, pages) of each sequence, in the order of their rows."""
        chunks: list[PagedChunk] = []
        positions: list[int] = []
        slots: list[int] = []
        for num_rows, start, pages in sequences:
            chunks.append(PagedChunk(len(slots), num_rows, start, tuple(pages)))
            positions += range(start, start + num_rows)
            slots += (pages[at // page_size] * page_size + at % page_size for at in range(start, start + num_rows))
        order = sorted((chunk for chunk in chunks if chunk.num_rows), key=lambda chunk: (chunk.num_rows, -chunk.end))
        groups = [_group(tuple(some), page_size, device) for _, some in groupby(order, lambda chunk: chunk.num_rows)]
        return cls(_integers(positions, device), _integers(slots, device), tuple(groups), page_size)


def paged_attention(
    q_NHC: Tensor, keys: PagedStore, values: PagedStore, batch: PagedBatch, kv_of_head: tuple[int, ...],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(C)) v of every row, in the dtype of `q_NHC`.

    Args:
        q_NHC: queries; H may be 0.
        keys, values: of this layer, with those of the step written.
        batch: the step.
        kv_of_head: which key/value head each query head reads.
        window: a row sees the last `window` positions, itself included; None: all.
    """
    num_rows, num_heads, width = q_NHC.shape
    out_NHC = torch.zeros_like(q_NHC)
    if not num_heads or not num_rows:
        return out_NHC
    heads_GR = _heads_of(kv_of_head, keys.num_heads).to(q_NHC.device)
    q_NHC = F.pad(q_NHC.float() * width**-0.5, (0, 0, 0, 1))  # a head of zeros, for groups with fewer than others
    num_keys = keys.num_heads * _block_pages(batch.page_size) * batch.page_size
    for group in batch.groups:
        at_once = max(1, _GATHERED // (num_keys * max(width, group.rows_UT.shape[1] * heads_GR.shape[1])))
        for first in range(0, len(group.chunks), at_once):
            some = slice(first, first + at_once)
            rows_UT = group.rows_UT[some]
            q_UTGRC = q_NHC[rows_UT][:, :, heads_GR]
            out_UTGRC = _attend(q_UTGRC, keys, values, group, some, batch.page_size, window)
            real_GR = heads_GR < num_heads
            out_NHC[rows_UT[..., None], heads_GR[real_GR]] = out_UTGRC[:, :, real_GR].to(out_NHC.dtype)
    return out_NHC


def _attend(
    q_UTGRC: Tensor, keys: PagedStore, values: PagedStore, group: PagedGroup, some: slice, page_size: int,
    window: int | None,
) -> Tensor:  # fmt: skip
    """The running softmax over blocks of keys, of the sequences `some` of `group`."""
    sequences, num_rows, groups, repeats, width = q_UTGRC.shape
    chunks, positions_UT, pages_UP = group.chunks[some], group.positions_UT[some], group.pages_UP[some]
    num_pages = _block_pages(page_size)
    num_keys = num_pages * page_size
    rest = -num_rows * repeats % TILE
    q_GUMC = F.pad(
        q_UTGRC.permute(2, 0, 1, 3, 4).reshape(groups, sequences, num_rows * repeats, width), (0, 0, 0, rest)
    )
    positions_UM = F.pad(positions_UT.repeat_interleave(repeats, 1), (0, rest))
    sums = _Sums(q_GUMC, -(-width // WIDTH) * WIDTH)
    begin = 0 if window is None else max(0, min(chunk.start for chunk in chunks) + 1 - window) // num_keys
    for block in range(begin, -(-chunks[0].end // num_keys)):
        first = block * num_keys
        num = sum(chunk.end > first for chunk in chunks)  # the longest come first; the others are done
        pages = pages_UP[:num, block * num_pages : (block + 1) * num_pages].flatten()
        k_GUKC, v_GUKC = (store.read(pages).view(groups, num, num_keys, width) for store in (keys, values))
        at_K = torch.arange(first, first + num_keys, device=pages.device)
        if any(chunk.end < first + num_keys for chunk in chunks[:num]):
            ends_U = _integers([chunk.end for chunk in chunks[:num]], pages.device)
            v_GUKC.masked_fill_((at_K >= ends_U[:, None])[None, ..., None], 0.0)
        hidden_UMK = at_K > positions_UM[:num, :, None]
        if window is not None:
            hidden_UMK = hidden_UMK | (at_K <= positions_UM[:num, :, None] - window)
        sums.add(num, k_GUKC, v_GUKC, hidden_UMK)
    out_GUMC = sums.mean()[:, :, : num_rows * repeats, :width]
    return out_GUMC.view(groups, sequences, num_rows, repeats, width).permute(1, 2, 0, 3, 4)


class _Sums:
    """What a running softmax keeps per row: the largest score so far, and the sums of weights and weighted values."""

    def __init__(self, q_GUMC: Tensor, width: int) -> None:
        self._q_GUMC = q_GUMC
        self._most = q_GUMC.new_full((*q_GUMC.shape[:3], 1), _NOTHING)
        self._weights = torch.zeros_like(self._most)
        self._values = q_GUMC.new_zeros(*q_GUMC.shape[:3], width)

    def add(self, num: int, k_GUKC: Tensor, v_GUKC: Tensor, hidden_UMK: Tensor) -> None:
        """One more block of keys, for the first `num` sequences."""
        most, weights, values = self._most[:, :num], self._weights[:, :num], self._values[:, :num]
        scores_GUMK = _bmm(self._q_GUMC[:, :num], k_GUKC.transpose(2, 3)).masked_fill_(hidden_UMK, float("-inf"))
        higher = torch.maximum(most, scores_GUMK.amax(-1, keepdim=True))
        kept = torch.exp(most - higher)
        probs_GUMK = scores_GUMK.sub_(higher).exp_()
        weights.mul_(kept).add_(probs_GUMK.sum(-1, keepdim=True))
        if not torch.isfinite(v_GUKC.sum()):  # 0 times NaN is NaN
            bad_GUK = ~torch.isfinite(v_GUKC).all(-1)
            v_GUKC = v_GUKC.masked_fill(bad_GUK[..., None], 0.0)
            weights.masked_fill_((bad_GUK[:, :, None] & ~hidden_UMK).any(-1, keepdim=True), float("nan"))
        if missing := values.shape[-1] - v_GUKC.shape[-1]:
            v_GUKC = F.pad(v_GUKC, (0, missing))
        values.mul_(kept).add_(_bmm(probs_GUMK, v_GUKC))
        most.copy_(higher)

    def mean(self) -> Tensor:
        """The answer; rows of padding, which see nothing where there is a window, are 0 / 0."""
        return self._values / self._weights


def _bmm(a_GUMX: Tensor, b_GUXY: Tensor) -> Tensor:
    groups, sequences, rows, inner = a_GUMX.shape
    y = torch.bmm(a_GUMX.reshape(-1, rows, inner), b_GUXY.reshape(-1, inner, b_GUXY.shape[-1]))
    return y.view(groups, sequences, rows, -1)


@lru_cache(maxsize=256)
def _heads_of(kv_of_head: tuple[int, ...], num_groups: int) -> Tensor:
    """The query heads of each key/value head, filled up with number H to as many."""
    heads = [[head for head, group in enumerate(kv_of_head) if group == at] for at in range(num_groups)]
    most = max(len(some) for some in heads)
    return torch.tensor([some + [len(kv_of_head)] * (most - len(some)) for some in heads])


def _block_pages(page_size: int) -> int:
    return -(-_BLOCK // page_size)


def _group(chunks: tuple[PagedChunk, ...], page_size: int, device: torch.device | str) -> PagedGroup:
    unit = _block_pages(page_size)
    num_pages = -(-chunks[0].end // (unit * page_size)) * unit
    used = [chunk.pages[: -(-chunk.end // page_size)] for chunk in chunks]
    pages = [[*some, *([0] * (num_pages - len(some)))] for some in used]
    rows = [list(range(chunk.row, chunk.row + chunk.num_rows)) for chunk in chunks]
    positions = [list(range(chunk.start, chunk.end)) for chunk in chunks]
    return PagedGroup(chunks, *(_integers(values, device) for values in (pages, rows, positions)))


def _integers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


def reference_attention(
    q_NHC: Tensor, k_GSC: Tensor, v_GSC: Tensor, batch: PagedBatch, kv_of_head: Sequence[int],
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """The same as `paged_attention`, one row and head after another: the specification. `k_GSC`: all slots."""
    out_NHC = torch.empty_like(q_NHC)
    for chunk in (chunk for group in batch.groups for chunk in group.chunks):
        for i in range(chunk.num_rows):
            end = chunk.start + i + 1
            at = range(0 if window is None else max(0, end - window), end)
            slots = [chunk.pages[key // batch.page_size] * batch.page_size + key % batch.page_size for key in at]
            for head, group in enumerate(kv_of_head):
                q_C, k_SC, v_SC = q_NHC[chunk.row + i, head].double(), k_GSC[group, slots], v_GSC[group, slots]
                probs_S = (k_SC.double() @ q_C * q_C.numel() ** -0.5).softmax(0)
                out_NHC[chunk.row + i, head] = (probs_S @ v_SC.double()).to(q_NHC.dtype)
    return out_NHC
