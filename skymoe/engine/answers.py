"""Many prompts, one engine, in the caller's own thread: what `skymoe.LLM` and the jobs on files share.

A `Desk` feeds the engine as it makes room, so that a million prompts do not stand in its queue, turns tokens into text,
and ends a request whose text came to a stop string. Several iterations may be under way at once: whoever runs a step
hands each output to the iteration it belongs to. An iteration that is left early (`close`, an error, Ctrl-C) takes its
requests back.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.data.tokenizer import TextTokenizer
from skymoe.engine.admission import QueueFullError
from skymoe.engine.engine import Engine
from skymoe.engine.interrupt import whole_step
from skymoe.engine.output import Finish, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.engine.text import TextDelta, TextOutput


@dataclass(frozen=True)
class Job:
    """A prompt and how to answer it; `key` is the caller's, and need not be unique."""

    key: int
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class News:
    """What one step brought for a job: as the engine says it, and as text."""

    job: Job
    output: TokenOutput
    delta: TextDelta


@dataclass
class _Open:
    job: Job
    text: TextOutput | None


class Desk:
    """Takes jobs to an engine and answers back.

    Args:
        engine: runs the steps.
        tokenizer: of the model; None gives tokens without text.
        most: jobs of one iteration that the engine has at a time.
    """

    def __init__(self, engine: Engine, tokenizer: TextTokenizer | None, *, most: int) -> None:
        self._engine, self._tokenizer, self._most = engine, tokenizer, most
        self._boxes: dict[str, deque[TokenOutput]] = {}  # of each request, the box of its iteration
        self._numbers = itertools.count()
        self._left = deque[str]()  # requests of iterations that were left
        self._lock, self._depth = threading.RLock(), 0

    def answer(self, jobs: Iterable[Job]) -> Generator[list[News]]:
        """News of all jobs, in the steps in which they come. A job that cannot be answered has Finish.ERROR.

        Raises:
            MachineError: a rank is dead or does not answer.
        """
        waiting = deque[Job]()  # at most one: taken from `jobs`, and the queue was full
        source, box = iter(jobs), deque[TokenOutput]()
        opened: dict[str, _Open] = {}
        try:
            while True:
                refused = self._fill(itertools.chain(_drained(waiting), source), waiting, opened, box)
                if refused:
                    yield refused
                elif not opened and not waiting:
                    return
                if opened or waiting:
                    news = self._step(opened, box)
                    if news:
                        yield news
        finally:
            self._take_back(opened)

    def _fill(
        self, jobs: Iterator[Job], waiting: deque[Job], opened: dict[str, _Open], box: deque[TokenOutput]
    ) -> list[News]:
        """Give the engine jobs while it has room; news of those it refuses."""
        refused: list[News] = []
        while len(opened) < self._most and len(refused) < self._most:
            job = next(jobs, None)
            if job is None:
                break
            name = str(next(self._numbers))
            try:
                with self._alone():
                    self._engine.add(name, job.prompt, job.params)
                    self._boxes[name] = box
            except QueueFullError:
                waiting.append(job)
                break
            except ConfigError as error:
                output = TokenOutput(request_id=name, finish=Finish.ERROR, error=error.what)
                refused.append(News(job, output, _without_text(output)))
                continue
            text = None if self._tokenizer is None else TextOutput(self._tokenizer, job.prompt, job.params)
            opened[name] = _Open(job, text)
        return refused

    def _step(self, opened: dict[str, _Open], box: deque[TokenOutput]) -> list[News]:
        """Run a step, unless another iteration has left something in our box, and read the box."""
        with self._alone():
            if not box:
                with whole_step():
                    for output in self._engine.step():
                        self._boxes.get(output.request_id, box).append(output)
            outputs = [box.popleft() for _ in range(len(box))]
        return [self._news(opened, output) for output in outputs if output.request_id in opened]

    def _news(self, opened: dict[str, _Open], output: TokenOutput) -> News:
        name = output.request_id
        job, text = opened[name].job, opened[name].text
        delta = _without_text(output) if text is None else text.push(output)
        if delta.finish is not None:
            with self._alone():
                if text is not None and text.stopped:
                    self._engine.abort(name)
                del self._boxes[name], opened[name]
        return News(job, output, delta)

    def _take_back(self, opened: dict[str, _Open]) -> None:
        self._left.extend(opened)
        with self._alone():
            pass

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread is here.

        The garbage collector may be, in this very thread, and end an iteration in the middle of a step of another: its
        requests are taken back when the step has ended.
        """
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                while self._left and self._depth == 1:
                    name = self._left.popleft()
                    self._engine.abort(name)
                    self._boxes.pop(name, None)
                self._depth -= 1


def _drained(waiting: deque[Job]) -> Iterator[Job]:
    while waiting:
        yield waiting.popleft()


def _without_text(output: TokenOutput) -> TextDelta:
    return TextDelta(
        token_ids=() if output.token_id is None else (output.token_id,),
        num_cached_tokens=output.num_cached_tokens,
        finish=output.finish,
        error=output.error,
    )
