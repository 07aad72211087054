"""Which tokens run in the next step: continuous batching over a paged cache. No torch.

    scheduled = scheduler.plan()              # what to run now: a StepPlan, and what is asked of its rows of logits
    sampled = ...                             # run the model, draw
    outputs = scheduler.settle(scheduled, sampled)

A step holds one token of every request that decodes, then pieces of prompts in the order of arrival, as many as
`max_step_tokens` takes (continuous batching: Yu et al. 2022, "Orca"; prompts in pieces beside decoding: Agrawal et al.
2024, "Sarathi-Serve"). A request is let in when the pages of all its tokens are free, strictly in the order of arrival;
it then takes one page at a time. When none is free, the request that arrived last gives its pages back and goes to the
front of the queue; it keeps what it has drawn, and is computed again later. The oldest request is never stopped by
others and fits alone (`add` sees to that), so each one ends. At most one prompt is half read, the last of the batch.

Left out: priorities, fairness between users, and swapping pages out (computing again is exact, and simpler). A long
prompt holds up those behind it, though not those that decode.
"""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.base.errors import ConfigError, printable
from skymoe.engine.admission import QueueFullError, check_request
from skymoe.engine.batch import Batch
from skymoe.engine.config import EngineConfig
from skymoe.engine.output import EngineStats, Finish, TokenOutput
from skymoe.engine.pages import PageTable
from skymoe.engine.progress import Progress
from skymoe.engine.request import Request, Sampled, SampleRow
from skymoe.engine.step_builder import Scheduled, StepBuilder, chunk_size


class Scheduler:
    """The requests of one engine.

    Args:
        config: `max_batch`, `max_step_tokens`, `max_queue`, `page_size`, `prefix_cache` of it.
        num_pages: of the cache.
        max_model_len: the most tokens of a request, prompt and answer.
        eos_ids: end-of-text tokens of the model.
        vocab_size: token ids are below it; None leaves that to the caller.

    Attributes:
        max_model_len: the same, or less where the cache holds less.
        chunk: tokens of a piece of a prompt.
        max_running: requests that run at once: `max_batch`, or fewer, so that a piece always fits beside those that
            decode; a prompt that was begun is read on in every step.
    """

    def __init__(
        self, config: EngineConfig, *, num_pages: int, max_model_len: int, eos_ids: Sequence[int],
        vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        self.chunk = chunk_size(config)
        self.max_model_len = min(max_model_len, num_pages * config.page_size)
        self.max_running = min(config.max_batch, config.max_step_tokens - self.chunk + 1)
        self._config, self._eos_ids, self._vocab_size = config, tuple(eos_ids), vocab_size
        self._pages = PageTable(num_pages, config.page_size, share=config.prefix_cache)
        self._batch = Batch(self._pages, self.max_running)
        self._requests: dict[str, Progress] = {}
        self._in_flight: Scheduled | None = None
        self._prompt_tokens = self._generation_tokens = self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether there is any request."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """A request joins the end of the queue.

        Raises:
            QueueFullError: too many wait.
            ConfigError: it can never be answered; says why.
        """
        check_request(request, max_model_len=self.max_model_len, vocab_size=self._vocab_size)
        if request.id in self._requests:
            raise ConfigError(f"the request {printable(request.id, 80)} is being answered already")
        if len(self._batch.waiting) >= self._config.max_queue:
            raise QueueFullError(f"the queue is full: {self._config.max_queue} requests wait", hint="try again later")
        progress = Progress(request, chunk=self.chunk, max_model_len=self.max_model_len, eos_ids=self._eos_ids)
        self._requests[request.id] = progress
        self._batch.join(progress)

    def abort(self, request_id: str) -> bool:
        """Ends a request, without any more news of it; its pages are free at once. False if there is none.

        While a step is running, too: whoever gets these pages writes them in a later step before reading them, and
        pages that were published get in this step the content they were published for.
        """
        progress = self._requests.get(request_id)
        if progress is not None:
            self._end(progress)
        return progress is not None

    def plan(self) -> Scheduled | None:
        """The next step, or None if there is no request. The step must be settled before the next is planned."""
        assert self._in_flight is None, "settle the step that is running first"
        if not self._requests:
            return None
        builder = StepBuilder(self._config.max_step_tokens, self._config.page_size)
        self._decode(builder)
        self._read(builder)
        self._in_flight = builder.build()
        return self._in_flight

    def settle(self, scheduled: Scheduled, sampled: Sequence[Sampled]) -> list[TokenOutput]:
        """Takes the answers to `scheduled.rows`, in their order; the news of each request that has any."""
        assert scheduled is self._in_flight and len(sampled) == len(scheduled.rows), "not the step that is running"
        self._in_flight = None
        self._num_steps += 1
        outputs: list[TokenOutput] = []
        at = 0
        for progress, chunk in zip(scheduled.pieces, scheduled.step.chunks, strict=True):
            rows = slice(at, at + chunk.num_logits)
            at += chunk.num_logits
            if not progress.is_over:
                outputs += self._take(progress, scheduled.rows[rows], sampled[rows])
        return outputs

    def stats(self) -> EngineStats:
        """How things stand; `step_seconds` and `expert_tokens` are for the engine to fill in."""
        return EngineStats(
            num_running=len(self._batch.running),
            num_waiting=len(self._batch.waiting),
            num_pages=self._pages.num_pages,
            free_pages=self._pages.num_free,
            cached_pages=self._pages.num_cached,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._batch.prefix_queries,
            prefix_hits=self._batch.prefix_hits,
            num_preemptions=self._batch.num_preemptions,
            num_steps=self._num_steps,
        )

    def _decode(self, builder: StepBuilder) -> None:
        """One token of each request that decodes. Whoever must stop for want of a page comes later in the batch."""
        running = self._batch.running
        at = 0
        while at < len(running):
            progress = running[at]
            if not progress.is_reading and self._batch.make_room(progress):
                builder.put(progress)
            at += 1

    def _read(self, builder: StepBuilder) -> None:
        """Pieces of those who are not up to date, then of those let in from the queue, until one does not fit."""
        for progress in self._batch.running:
            if not self._read_pieces(builder, progress):
                return
        while builder.room and (admitted := self._batch.admit()) is not None:
            if not self._read_pieces(builder, admitted):
                return

    def _read_pieces(self, builder: StepBuilder, progress: Progress) -> bool:
        while (start := progress.computed) < progress.length:
            if not builder.put(progress):
                return False
            self._batch.publish(progress, start, progress.computed)
        return True

    def _take(self, progress: Progress, rows: Sequence[SampleRow], sampled: Sequence[Sampled]) -> list[TokenOutput]:
        """The news of one request from the answers to its rows."""
        request_id, news = progress.request.id, []
        for row, answer in zip(rows, sampled, strict=True):
            if answer.error:
                self._pages.forget(progress.pages)
                self._end(progress)
                return [TokenOutput(request_id=request_id, finish=Finish.ERROR, error=answer.error)]
            if row.target is not None:
                progress.add_prompt_logprobs(answer)
            else:
                news.append(self._drawn(progress, answer))
        return news

    def _drawn(self, progress: Progress, answer: Sampled) -> TokenOutput:
        is_first = not progress.output
        finish = progress.append(answer)
        self._generation_tokens += 1
        self._prompt_tokens += len(progress.prompt) if is_first else 0
        if finish is not None:
            self._end(progress)
        return TokenOutput(
            request_id=progress.request.id,
            token_id=answer.token_id,
            logprobs=answer.logprobs,
            prompt_logprobs=progress.all_prompt_logprobs if is_first else None,
            num_cached_tokens=progress.num_cached if is_first else None,
            finish=finish,
        )

    def _end(self, progress: Progress) -> None:
        progress.is_over = True
        del self._requests[progress.request.id]
        self._batch.leave(progress)
