from __future__ import annotations

import numpy as np
import pytest

from skymoe.base.errors import FormatError
from skymoe.data.indexed import IndexedDataset
from skymoe.data.packing import IGNORE, cut, num_windows

DOCUMENTS = [[10, 11, 1], [20, 1], [], [30, 31, 32, 33, 34, 1], [1], [40, 1]]  # 14 tokens; one empty document
STREAM = [token for document in DOCUMENTS for token in document]


def reference(start: int, length: int, isolate: bool) -> list[list[int]]:
    """One row by a plain loop over positions."""
    begins = {sum(map(len, DOCUMENTS[:i])) for i in range(len(DOCUMENTS))}
    rows: list[list[int]] = [[], [], [], [], []]
    document = position = 0
    for place in range(start, start + length):
        valid = place + 1 < len(STREAM)
        first_pad = place == len(STREAM)
        if place > start and isolate and (place in begins or first_pad):
            document, position = document + 1, 0
        crosses = isolate and place + 1 in begins
        values = STREAM[place] if valid else 0, STREAM[place + 1] if valid and not crosses else IGNORE
        for row, value in zip(rows, (*values, document, position, int(valid)), strict=True):
            row.append(value)
        position += 1
    return rows


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("length", [1, 3, 5, 13, 20])
def test_rows_equal_the_plain_loop(write_tokens, isolate: bool, length: int) -> None:
    data = IndexedDataset(write_tokens("x", DOCUMENTS))
    starts = np.array([12, 0, 3, 5, 6, 9])
    batch = cut(data, starts, length, isolate_documents=isolate, vocab_size=None)
    for row, start in enumerate(starts):
        found = [array[row].astype(int).tolist() for array in batch[:5]]
        assert found == reference(int(start), length, isolate)


def test_isolation_never_asks_for_a_token_of_another_document(write_tokens) -> None:
    data = IndexedDataset(write_tokens("x", DOCUMENTS))
    batch = cut(data, np.arange(10), 6, isolate_documents=True, vocab_size=None)
    same = batch.document_ids_BT[:, 1:] == batch.document_ids_BT[:, :-1]
    scored = batch.targets_BT[:, :-1] != IGNORE
    assert (same | ~scored).all() and scored.any()
    assert ((batch.positions_BT[:, 1:] == 0) == ~same).all()


def test_every_pair_is_in_exactly_one_window() -> None:
    for tokens in range(40):
        for length in (1, 2, 7, 50):
            windows = num_windows(tokens, length)
            assert windows * length >= tokens - 1 > (windows - 1) * length or windows == 0 and tokens <= 1


def test_tokens_outside_the_vocabulary_are_refused(write_tokens) -> None:
    data = IndexedDataset(write_tokens("x", [[1, 2, 99, 3]]))
    cut(data, np.array([0]), 3, isolate_documents=False, vocab_size=100)
    with pytest.raises(FormatError, match="token 99 is outside the vocabulary of 99"):
        cut(data, np.array([0]), 3, isolate_documents=False, vocab_size=99)
    negative = IndexedDataset(write_tokens("n", [[1, -2, 3]], "int32"))
    with pytest.raises(FormatError, match="token -2"):
        cut(negative, np.array([0]), 2, isolate_documents=False, vocab_size=None)


def test_rows_are_views(write_tokens) -> None:
    batch = cut(IndexedDataset(write_tokens("x", 100)), np.arange(6), 4, isolate_documents=True, vocab_size=None)
    part = batch.rows(2, 5)
    assert part.tokens_BT.shape == (3, 4) and np.shares_memory(part.tokens_BT, batch.tokens_BT)
    assert part.source_B.shape == (3,)
