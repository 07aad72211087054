"""How far one request has come: its tokens, its pages, the pieces in which it is computed, and when it ends. No torch.

A prompt is computed in *pieces*: cut at multiples of a fixed chunk, the last piece ends with the prompt. Where it is
cut depends on the prompt alone, never on what else is in the batch. Drawn tokens are pieces of one token, also when
they are computed again after a preemption. So every position is always computed in the same piece, and with kernels
whose rows do not depend on their neighbours in the step, a request gets the same logits to the last bit in any company.
A step may hold several pieces of one request, one after another (`StepPlan.chunks` in order; keys and values of a step
are written before any row reads them).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from skymoe.engine.output import Finish, TokenLogprobs
from skymoe.engine.params import MAX_SEED
from skymoe.engine.request import Request, Sampled, SampleRow
from skymoe.engine.step import Chunk


class Progress:
    """A request on its way.

    Args:
        request: what came in.
        chunk: tokens of a piece of the prompt.
        max_model_len: prompt and answer together are at most so long.
        eos_ids: end-of-text tokens of the model.

    Attributes:
        output: tokens drawn so far.
        seed: of its draws.
        pages: it holds; empty while it waits.
        computed: positions in the cache, those of the step that is running included.
        keys: of the prompt's full pages, as far as they can be shared; None until they are needed.
        num_cached: prompt tokens found in the cache when it first began; None before.
        prompt_logprobs: of prompt tokens 1, 2, ...; those known so far.
        is_over: it was answered, aborted or failed.
    """

    __slots__ = (
        "_ends",
        "chunk",
        "computed",
        "is_over",
        "keys",
        "max_length",
        "num_cached",
        "output",
        "pages",
        "prompt",
        "prompt_logprobs",
        "request",
        "seed",
    )

    def __init__(self, request: Request, *, chunk: int, max_model_len: int, eos_ids: Sequence[int]) -> None:
        params = request.params
        self.request, self.chunk = request, chunk
        self.prompt = request.prompt
        self.output: list[int] = []
        self.seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
        self.pages: list[int] = []
        self.computed = 0
        self.keys: list[bytes] | None = None
        self.num_cached: int | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None if params.prompt_logprobs is None else []
        self.is_over = False
        answer = max_model_len if params.max_tokens is None else params.max_tokens
        self.max_length = min(len(request.prompt) + answer, max_model_len)
        ends = params.stop_token_ids if params.ignore_eos else (*eos_ids, *params.stop_token_ids)
        self._ends = tuple(dict.fromkeys(ends))

    @property
    def length(self) -> int:
        """Tokens known: the prompt and what was drawn. All but the newest must be in the cache to draw the next."""
        return len(self.prompt) + len(self.output)

    @property
    def is_reading(self) -> bool:
        """Whether more than the token drawn last is still to be computed."""
        return not self.output or self.computed < self.length - 1

    @property
    def num_shareable(self) -> int:
        """Prompt tokens whose pages others may use: of whole chunks, since a shorter last piece is another piece."""
        return len(self.prompt) // self.chunk * self.chunk

    @property
    def num_findable(self) -> int:
        """Prompt tokens that may come out of the cache: of whole chunks too, and never the last token."""
        return 0 if self.prompt_logprobs is not None else (len(self.prompt) - 1) // self.chunk * self.chunk

    def next_end(self) -> int:
        """Where the piece that begins at `computed` ends."""
        start, num_prompt = self.computed, len(self.prompt)
        return min((start // self.chunk + 1) * self.chunk, num_prompt) if start < num_prompt else start + 1

    def num_rows(self, end: int) -> int:
        """Rows of logits that are wanted of the piece from `computed` to `end`."""
        draws = end == self.length
        if self.prompt_logprobs is None or self.computed >= len(self.prompt):
            return int(draws)
        wanted = min(end, len(self.prompt) - 1)  # positions before it stand before a prompt token
        missing = max(0, wanted - max(self.computed, len(self.prompt_logprobs)))
        return missing + draws

    def piece(self, end: int, page_size: int, num_rows: int) -> Chunk:
        """The piece from `computed` to `end`, which is computed now."""
        start, num_prompt = self.computed, len(self.prompt)
        tokens = self.prompt[start:end] if start < num_prompt else (self.output[start - num_prompt],)
        self.computed = end
        return Chunk(tokens, start, tuple(self.pages[: -(-end // page_size)]), num_rows)

    def rows(self, end: int, num_rows: int) -> list[SampleRow]:
        """What is asked of the last `num_rows` positions before `end`."""
        num_drawn, num_prompt = len(self.output), len(self.prompt)
        rows = []
        for position in range(end - num_rows, end):
            is_prompt = position + 1 < num_prompt
            rows.append(
                SampleRow(
                    self.request.id,
                    self.prompt,
                    self.output,
                    self.request.params,
                    self.seed,
                    num_drawn,
                    self._ends if not is_prompt and num_drawn < self.request.params.min_tokens else (),
                    self.prompt[position + 1] if is_prompt else None,
                )
            )
        return rows

    @property
    def all_prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Of prompt tokens 1, 2, ...; None where not asked for."""
        return None if self.prompt_logprobs is None else tuple(self.prompt_logprobs)

    def add_prompt_logprobs(self, answer: Sampled) -> None:
        """The log-probabilities of the next prompt token."""
        assert self.prompt_logprobs is not None and answer.logprobs is not None, "asked for, so given"
        self.prompt_logprobs.append(answer.logprobs)

    def append(self, answer: Sampled) -> Finish | None:
        """A token was drawn; whether and why that ends the request."""
        assert answer.token_id is not None, "no token and no error"
        self.output.append(answer.token_id)
        if answer.token_id in self._ends and len(self.output) > self.request.params.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if self.length >= self.max_length else None
