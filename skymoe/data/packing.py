"""From places in a token file to rows a model trains on.

Documents stand one after another, each closed by its end-of-text token, and the line of tokens is cut every T tokens
(concat and chunk): no padding, no waste, and a window may hold the end of one document and the beginning of the next.
What then keeps documents apart is a choice, `isolate_documents`:

    no    one stream: positions run 0..T-1, document id 0 everywhere; the model learns to start afresh after an end
    yes   positions restart with each document, ids count the documents of the window (attention stays within equal
          ids), and the last token of a document is not asked to predict the first of the next

A row that reaches past the end of the file is padded: token 0, `valid` False, target -100, and with isolation a
document id of its own. Pads are for the shape only: they are never routed, never scored.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import FormatError
from skymoe.data.indexed import IndexedDataset

I64 = npt.NDArray[np.int64]

IGNORE = -100
"""Target of a position that is not scored (the convention of torch's cross entropy)."""


class Batch(NamedTuple):
    """B rows of T tokens."""

    tokens_BT: I64
    targets_BT: I64
    document_ids_BT: I64
    positions_BT: I64
    valid_BT: npt.NDArray[np.bool_]
    source_B: I64
    """Which source of the mixture each row comes from."""

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) as views: a micro-batch."""
        return Batch._make(array[start:stop] for array in self)


class Sample(NamedTuple):
    """One row."""

    tokens_T: I64
    targets_T: I64
    document_ids_T: I64
    positions_T: I64
    valid_T: npt.NDArray[np.bool_]
    source: int


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Rows that `num_tokens` make, the last one padded. Neighbours share one token: target here, input there."""
    return max(0, -(-(num_tokens - 1) // sequence_length))


def cut(
    dataset: IndexedDataset, start_B: I64, sequence_length: int, *, isolate_documents: bool, vocab_size: int | None
) -> Batch:
    """The rows that begin at tokens `start_B` of `dataset`; `source_B` is zero.

    Raises:
        FormatError: a token is negative, or not below `vocab_size` (when given).
    """
    num_tokens = dataset.num_tokens
    place_BU = start_B[:, None] + np.arange(sequence_length + 1)  # U = T + 1: inputs and the target of the last
    stored_BU = dataset.tokens[np.minimum(place_BU, num_tokens - 1)].astype(np.int64)
    _check_tokens(stored_BU, dataset, vocab_size)
    valid_BT = place_BU[:, 1:] < num_tokens
    tokens_BT = np.where(valid_BT, stored_BU[:, :-1], 0)
    targets_BT = np.where(valid_BT, stored_BU[:, 1:], IGNORE)
    positions_BT = np.broadcast_to(np.arange(sequence_length), tokens_BT.shape)
    if isolate_documents:
        first_BU = _document_starts(dataset.document_bounds, start_B, sequence_length + 1)
        targets_BT[first_BU[:, 1:]] = IGNORE
        first_BT = first_BU[:, :-1]
        document_ids_BT = np.cumsum(first_BT, axis=1, dtype=np.int64)
        began_BT = np.maximum.accumulate(np.where(first_BT, positions_BT, 0), axis=1)
        positions_BT = positions_BT - began_BT
    else:
        document_ids_BT = np.zeros(tokens_BT.shape, np.int64)
    source_B = np.zeros(len(start_B), np.int64)
    return Batch(tokens_BT, targets_BT, document_ids_BT, np.ascontiguousarray(positions_BT), valid_BT, source_B)


def _document_starts(bounds: I64, start_B: I64, width: int) -> npt.NDArray[np.bool_]:
    """Where in each row a document begins (B, width). The first column stays False: a row always begins something.

    The end of the file is a bound too: the pads behind it become a document of their own.
    """
    low_B = np.searchsorted(bounds, start_B, side="right")
    high_B = np.searchsorted(bounds, start_B + width, side="left")
    count_B = high_B - low_B
    row_N = np.repeat(np.arange(len(start_B)), count_B)
    skipped_N = np.repeat(np.cumsum(count_B) - count_B, count_B)
    bound_N = bounds[np.arange(len(row_N)) - skipped_N + low_B[row_N]]
    first_BU = np.zeros((len(start_B), width), np.bool_)
    first_BU[row_N, bound_N - start_B[row_N]] = True
    return first_BU


def _check_tokens(stored_BU: I64, dataset: IndexedDataset, vocab_size: int | None) -> None:
    if stored_BU.size == 0:
        return
    low, high = int(stored_BU.min()), int(stored_BU.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise FormatError(
            f"token {low if low < 0 else high} is outside the vocabulary of {vocab_size}",
            where=dataset.bin_path,
            why="the data was tokenized for another model, or is damaged",
            hint="build the data with the tokenizer of the model",
        )
