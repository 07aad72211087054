"""A model on paper: it keeps in pages what a real one would keep there, so that a wrong page gives a wrong answer.

The cell of a position holds what its keys and values depend on: its token, where it stands, and the piece in which it
was computed. A row of logits is all cells it sees through the pages it was given; the token drawn from it depends on
those, the seed and the index of the draw. `answer_alone` says what a request must get, without scheduler and pages.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from skymoe.engine.config import EngineConfig
from skymoe.engine.output import Finish, TokenLogprobs
from skymoe.engine.request import Request, Sampled, SampleRow
from skymoe.engine.scheduler import Scheduler
from skymoe.engine.step_builder import Scheduled

VOCABULARY = 23
EOS = (3, 5)


def config_of(**fields: Any) -> EngineConfig:
    """A small engine."""
    return EngineConfig(**{"model": Path("x"), "page_size": 2, "max_batch": 4, "max_step_tokens": 12, **fields})


def scheduler_of(num_pages: int = 1000, max_model_len: int = 100, **fields: Any) -> Scheduler:
    """Its scheduler."""
    return Scheduler(
        config_of(**fields), num_pages=num_pages, max_model_len=max_model_len, eos_ids=EOS, vocab_size=VOCABULARY
    )


def draw(seen: int, seed: int, num_drawn: int, banned: Container[int]) -> int:
    """A token out of what a row sees."""
    token = hash((seen, seed, num_drawn)) % VOCABULARY
    while token in banned:
        token = (token + 1) % VOCABULARY
    return token


def logprobs_of(seen: int, token: int) -> TokenLogprobs:
    """Log-probabilities that tell what the row saw and for which token."""
    return TokenLogprobs(-float(seen % 1000), 1 + token)


class PaperModel:
    """Runs steps as a rank would: all rows are written, then each sees what its pages hold."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._cells: dict[tuple[int, int], int] = {}

    def run(self, scheduled: Scheduled) -> list[Sampled]:
        """The answers to the rows of a step."""
        written: set[tuple[int, int]] = set()
        for chunk in scheduled.step.chunks:
            assert len(chunk.pages) * self.page_size >= chunk.end > chunk.start >= 0
            for position in range(chunk.start, chunk.end):
                slot = self._slot(chunk.pages, position)
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                token = chunk.tokens[position - chunk.start]
                self._cells[slot] = hash((token, position, chunk.start, chunk.end))
        seen = [
            hash(tuple(self._cells[self._slot(chunk.pages, position)] for position in range(end)))
            for chunk in scheduled.step.chunks
            for end in range(chunk.end - chunk.num_logits + 1, chunk.end + 1)
        ]
        return [answer(row, value) for row, value in zip(scheduled.rows, seen, strict=True)]

    def _slot(self, pages: tuple[int, ...], position: int) -> tuple[int, int]:
        return pages[position // self.page_size], position % self.page_size


def answer(row: SampleRow, seen: int) -> Sampled:
    """What a sampler answers."""
    assert row.num_drawn == len(row.output)
    if row.target is not None:
        return Sampled(logprobs=logprobs_of(seen, row.target))
    token = draw(seen, row.seed, row.num_drawn, row.banned)
    return Sampled(token, None if row.params.logprobs is None else logprobs_of(seen, token))


def answer_alone(request: Request, chunk: int, max_model_len: int) -> tuple[list[int], Finish, list[TokenLogprobs]]:
    """Tokens, why they end, and log-probabilities of the prompt: one request, one token after another."""
    prompt, params, output = request.prompt, request.params, list[int]()
    num = len(prompt)
    borders = [(start, min(start + chunk, num)) for start in range(0, num, chunk)]
    cells = [hash((prompt[p], p, start, end)) for start, end in borders for p in range(start, end)]
    of_prompt = [logprobs_of(hash(tuple(cells[:p])), prompt[p]) for p in range(1, num)]
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    assert params.seed is not None
    while True:
        index = len(output)
        token = draw(hash(tuple(cells)), params.seed, index, ends if index < params.min_tokens else ())
        output.append(token)
        if token in ends and index >= params.min_tokens:
            return output, Finish.STOP, of_prompt
        if len(output) == params.max_tokens or num + len(output) == max_model_len:
            return output, Finish.LENGTH, of_prompt
        at = num + index
        cells.append(hash((token, at, at, at + 1)))
