"""StepBuilder: a step that is being put together, piece by piece. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.engine.config import EngineConfig
from skymoe.engine.progress import Progress
from skymoe.engine.request import SampleRow
from skymoe.engine.step import Chunk, StepPlan

_CHUNK = 128
MAX_PROMPT_ROWS = 256
"""rows of logits in a step, beside those that draw: a row is as long as the vocabulary"""


def chunk_size(config: EngineConfig) -> int:
    """Tokens of a piece of a prompt: whole pages, up to 128 tokens, and such that it fits beside a full batch."""
    if config.page_size > config.max_step_tokens:
        raise ConfigError(
            f"a step of {config.max_step_tokens} tokens is smaller than a page of {config.page_size}",
            where="max_step_tokens",
            why="prompts are read in pieces of whole pages",
            hint="raise max_step_tokens or lower page_size",
        )
    room = max(config.max_step_tokens - config.max_batch, config.max_step_tokens // 2)
    return max(1, min(room, _CHUNK) // config.page_size) * config.page_size


@dataclass(frozen=True)
class Scheduled:
    """A step that is to run.

    Attributes:
        step: for the ranks.
        rows: what is asked of each row of its logits, in their order.
        pieces: the request of each chunk of the step.
    """

    step: StepPlan
    rows: tuple[SampleRow, ...]
    pieces: tuple[Progress, ...]


class StepBuilder:
    """Takes pieces as long as there is room for `max_tokens` tokens."""

    def __init__(self, max_tokens: int, page_size: int) -> None:
        self.room, self._page_size = max_tokens, page_size
        self._prompt_rows = MAX_PROMPT_ROWS
        self._chunks: list[Chunk] = []
        self._rows: list[SampleRow] = []
        self._pieces: list[Progress] = []

    def put(self, progress: Progress) -> bool:
        """Takes the next piece of a request; False if there is no room for it."""
        end = progress.next_end()
        size, num_rows = end - progress.computed, progress.num_rows(end)
        if size > self.room or (num_rows > 1 and num_rows > self._prompt_rows):
            return False
        self.room -= size
        self._prompt_rows -= num_rows if num_rows > 1 else 0
        self._chunks.append(progress.piece(end, self._page_size, num_rows))
        self._pieces.append(progress)
        if num_rows:
            self._rows += progress.rows(end, num_rows)
        return True

    def build(self) -> Scheduled:
        """The step; it has at least one piece."""
        assert self._pieces, "a request cannot go on although it fits alone"
        return Scheduled(StepPlan(tuple(self._chunks)), tuple(self._rows), tuple(self._pieces))
