"""Held-out text: every token scored exactly once, in order; and how many bytes a token stands for.

Loss in nats per token cannot be compared between tokenizers; bits per byte can:

    bits per byte = sum of losses over scored targets / (ln 2 * bytes of those targets)

The windows lie end to end, each one token over the next, so the first token of a window has little context. A sliding
window would score lower and cost many times more; it is the same for all models compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from skymoe.base.errors import ConfigError
from skymoe.data.packing import Batch, cut, num_windows
from skymoe.data.sampler import open_tokens


class EvaluationWindows:
    """The fixed rows of one held-out token file.

    Args:
        prefix: the token file.
        sequence_length: T.
        limit: at most so many rows, spread evenly over the file; None takes all.
        isolate_documents: as in training.
        vocab_size: refuse tokens that the model does not have.

    Raises:
        FormatError: the file is unreadable or too short for one target.
    """

    def __init__(
        self,
        prefix: Path,
        sequence_length: int,
        limit: int | None = None,
        *,
        isolate_documents: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        if sequence_length < 1 or (limit is not None and limit < 1):
            raise ConfigError(f"evaluation needs whole windows: length {sequence_length}, limit {limit}")
        self.dataset = open_tokens(prefix)
        self.sequence_length = sequence_length
        self._isolate_documents, self._vocab_size = isolate_documents, vocab_size
        total = num_windows(self.dataset.num_tokens, sequence_length)
        chosen = total if limit is None else min(limit, total)
        self._start_W = np.arange(chosen) * total // chosen * sequence_length

    def __len__(self) -> int:
        return len(self._start_W)

    def batch(self, first: int, count: int) -> Batch:
        """Rows [first, first + count), fewer at the end."""
        return cut(
            self.dataset,
            self._start_W[first : first + count],
            self.sequence_length,
            isolate_documents=self._isolate_documents,
            vocab_size=self._vocab_size,
        )

    def batches(self, size: int) -> Iterator[Batch]:
        """All rows, `size` at a time; the last batch may be smaller."""
        for first in range(0, len(self), size):
            yield self.batch(first, size)
