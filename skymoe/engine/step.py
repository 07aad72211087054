"""StepPlan: what every rank runs in one step, decided by the scheduler on rank 0. Plain integers; no torch.

A step runs some tokens of some sequences through the model: one token of each sequence that decodes, a chunk of the
prompt of each that is being read. Where keys and values lie is in the plan too, so ranks keep no state but the cache
itself and cannot disagree. A plan travels to the other ranks as one row of 64-bit integers (`encode`, `decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence.

    Attributes:
        tokens: token ids, at least one.
        start: position of the first, which is how many tokens of the sequence are in the cache already.
        pages: pages of the sequence, in order; they hold positions 0 .. start + len(tokens) - 1. Page i holds positions
            i * page_size .. (i + 1) * page_size - 1.
        num_logits: of how many of the last tokens the logits are wanted: 0 in the middle of a prompt, 1 at its end and
            in decoding, more where the log-probabilities of the prompt are asked for.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    num_logits: int

    @property
    def end(self) -> int:
        """Tokens in the cache after this chunk."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class StepPlan:
    """The chunks of one step, in the order of their rows.

    Several chunks may be of one sequence, one after another, and a chunk may read pages that an earlier chunk of the
    same step writes: in each layer, keys and values of all rows are written before any row attends.
    """

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def num_logits(self) -> int:
        """Rows of logits."""
        return sum(chunk.num_logits for chunk in self.chunks)

    def encode(self) -> list[int]:
        """The plan as one row of integers."""
        row = [len(self.chunks)]
        for chunk in self.chunks:
            row += (len(chunk.tokens), chunk.start, len(chunk.pages), chunk.num_logits, *chunk.tokens, *chunk.pages)
        return row

    @classmethod
    def decode(cls, row: Sequence[int]) -> StepPlan:
        """The plan of `encode`."""
        chunks, at = [], 1
        for _ in range(row[0]):
            num_tokens, start, num_pages, num_logits = row[at : at + 4]
            at += 4
            tokens = tuple(row[at : at + num_tokens])
            at += num_tokens
            pages = tuple(row[at : at + num_pages])
            at += num_pages
            chunks.append(Chunk(tokens, start, pages, num_logits))
        return cls(tuple(chunks))
