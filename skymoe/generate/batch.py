"""`skymoe generate DIR --input prompts.jsonl --output out.jsonl`: a file of prompts in, a file of answers out.

Everything that can be wrong with the files is said before the model is loaded (tasks.py, results.py). Then the prompts
that have no answer yet go to the engine as it makes room, and each answer is on the disk before the next step. So the
work can be stopped at any moment, by Ctrl-C, SIGTERM or the power, and the same command goes on where it stopped.
With the same seed a prompt is answered the same whether the work was stopped or not, and whatever stands beside it.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymoe.base.errors import ConfigError, SkymoeError
from skymoe.base.files import machine_errors
from skymoe.base.log import logger
from skymoe.base.progress import progress
from skymoe.engine.answers import Job, News
from skymoe.engine.completion import Draft
from skymoe.engine.llm import LLM
from skymoe.engine.output import Finish, TokenLogprobs
from skymoe.generate.config import BatchConfig
from skymoe.generate.results import Results, key_of, open_results
from skymoe.generate.tasks import Task, check_tasks, read_tasks

_INTERRUPTED = 75
_WEIGHTS = (".safetensors", ".json", ".jinja")
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file of weights: another training run changes nearly all of them


@dataclass(frozen=True)
class BatchReport:
    """What a call did.

    Attributes:
        output: the file.
        num_prompts: in the input.
        num_done: of them have an answer now; `num_before` had one before this call.
        num_failed: of `num_done`, those that could not be answered (their lines have `error`).
        prompt_tokens, generation_tokens: of this call.
        seconds: of this call, loading included.
        tokens_per_s: tokens written per second, loading not included.
        interrupted: whether it was stopped; the same command goes on.
    """

    output: str
    num_prompts: int
    num_done: int
    num_before: int
    num_failed: int
    prompt_tokens: int
    generation_tokens: int
    seconds: float
    tokens_per_s: float
    interrupted: bool

    @property
    def exit_code(self) -> int:
        """0; 1 when a prompt could not be answered; 75 when it was interrupted and can be resumed."""
        return _INTERRUPTED if self.interrupted else int(self.num_failed > 0)


def run(config: BatchConfig) -> BatchReport:
    """Answer the prompts of `config.input` that have no answer in `config.output` yet.

    Raises:
        FormatError: a line of the input cannot be used (all are read first), or the model.
        ConfigError: the output is of another run.
        MachineError: another run writes the output, the system refuses, a rank died. What is done is kept.
    """
    begin = time.perf_counter()
    _refuse_same(config.input, config.output)
    digests = check_tasks(config)
    engine = config.engine
    model = f"{fingerprint(engine.model)} {engine.dtype} {engine.kv_dtype} {engine.max_model_len}"
    keys = {index: key_of(model, digest) for index, digest in digests.items()}
    with open_results(config.output, keys, overwrite=config.overwrite) as results:
        if results.num_repaired:
            logger.info(f"the last line of {config.output} was torn and is done again")
        before = len(results.done)
        work, interrupted = _Work(config, results, keys), False
        try:
            with _sigterm_interrupts():
                if before < len(keys):
                    work.run()
        except KeyboardInterrupt:
            interrupted = True
            logger.warning(f"stopped with {len(results.done)} of {len(keys)} done; the same command goes on from there")
        return BatchReport(
            output=str(config.output),
            num_prompts=len(keys),
            num_done=len(results.done),
            num_before=before,
            num_failed=len(results.failed),
            prompt_tokens=work.prompt_tokens,
            generation_tokens=work.generation_tokens,
            seconds=time.perf_counter() - begin,
            tokens_per_s=work.generation_tokens / work.seconds if work.seconds else 0.0,
            interrupted=interrupted,
        )


def fingerprint(model: Path) -> str:
    """Of a model directory, cheaply: its small files by content, its weights by size and samples of their bytes."""
    digest = hashlib.sha256()
    for path in sorted(model.iterdir()) if model.is_dir() else ():
        if path.suffix in _WEIGHTS and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
            with machine_errors(path), path.open("rb") as file:
                whole = path.suffix != ".safetensors"
                for sample in range(1 if whole else _SAMPLES):
                    file.seek(size * sample // _SAMPLES)
                    digest.update(file.read(-1 if whole else _SAMPLE_BYTES))
    return digest.hexdigest()


class _Work:
    """The prompts that are left, on their way through the engine into the output."""

    def __init__(self, config: BatchConfig, results: Results, keys: dict[int, str]) -> None:
        self._config, self._results, self._keys = config, results, keys
        self._tasks: dict[int, Task] = {}
        self._drafts: dict[int, Draft] = {}
        self._lines: list[dict[str, Any]] = []  # done, and not on the disk yet
        self.prompt_tokens = self.generation_tokens = 0
        self.seconds = 0.0

    def run(self) -> None:
        """Answer all of them."""
        options = self._config.engine.model_dump(mode="json", exclude_none=True)
        num_done = len(self._results.done)
        with LLM(**options) as llm, progress("generate", len(self._keys), "prompts", done=num_done) as bar:
            begin = time.perf_counter()
            for step in llm.answer(self._jobs(llm)):
                for news in step:
                    self._take(news)
                self.seconds = time.perf_counter() - begin
                bar.advance(self._write(), tokens=self.generation_tokens)
            bar.advance(self._write())

    def _jobs(self, llm: LLM) -> Iterator[Job]:
        """The prompts that are left, as the engine asks for them. What cannot become tokens is answered here."""
        done = frozenset(self._results.done)
        for task in read_tasks(self._config):
            if task.index in done:
                continue
            if task.index not in self._keys:
                raise ConfigError("the input changes while it is worked on", where=self._config.input)
            try:
                prompt = llm.encode(task.prompt) if task.prompt is not None else llm.chat_prompt(task.messages or ())
            except SkymoeError as error:
                self._lines.append(self._line(task, {"error": error.what}))
                continue
            self._tasks[task.index] = task
            yield Job(task.index, prompt, task.params)

    def _take(self, news: News) -> None:
        index = news.job.key
        draft = self._drafts.setdefault(index, Draft())
        draft.push(news.output, news.delta)
        self.generation_tokens += len(news.delta.token_ids)
        if news.delta.finish is not None:
            self.prompt_tokens += len(news.job.prompt)
            self._lines.append(self._line(self._tasks.pop(index), _answered(news.job, self._drafts.pop(index))))

    def _line(self, task: Task, answer: dict[str, Any]) -> dict[str, Any]:
        named = {} if task.id is None else {"id": task.id}
        return {"index": task.index, **named, **answer, "key": self._keys[task.index]}

    def _write(self) -> int:
        lines, self._lines = self._lines, []
        if lines:
            self._results.append(lines)
        return len(lines)


def _answered(job: Job, draft: Draft) -> dict[str, Any]:
    """An answer, as it stands in the output."""
    answer = draft.answer()
    if answer.finish is Finish.ERROR:
        return {"error": answer.error}
    line: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish": str(answer.finish),
        "num_prompt_tokens": len(job.prompt),
    }
    if answer.logprobs is not None:
        line["logprobs"] = [_logprobs(entry) for entry in answer.logprobs]
    if draft.prompt_logprobs is not None:
        line["prompt_logprobs"] = [_logprobs(entry) for entry in draft.prompt_logprobs]
    return line


def _logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    return {"logprob": entry.logprob, "rank": entry.rank, "top": entry.top}


def _refuse_same(input_: Path, output: Path) -> None:
    if output.exists() and input_.exists() and output.samefile(input_):
        raise ConfigError("the output is the input", where=output)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
