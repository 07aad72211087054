"""`skymoe.LLM`: a model in the user's own program.

    from skymoe import LLM, SamplingParams

    with LLM("model", tp=2) as llm:
        for completion in llm.generate(["Once upon a time", "The sea"], SamplingParams(max_tokens=50, temperature=0)):
            print(completion.text)

Rank 0 of the engine is this process, the others are started and ended by it. What a prompt is answered does not depend
on the prompts beside it, nor on the number of ranks as long as no two tokens are equally likely up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError, FormatError
from skymoe.base.progress import progress as progress_bar
from skymoe.data.tokenizer import TextTokenizer, load_tokenizer
from skymoe.engine.answers import Desk, Job, News
from skymoe.engine.chat_template import ChatTemplate, load_chat_template
from skymoe.engine.completion import Completion, Draft, completion
from skymoe.engine.config import EngineConfig
from skymoe.engine.engine import Engine
from skymoe.engine.output import EngineInfo, EngineStats
from skymoe.engine.params import MAX_SEED, SamplingParams
from skymoe.engine.text import TextDelta

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, str]

_MAX_N = 1024


class LLM:
    """A loaded model.

    Args:
        model: a Hugging Face model directory.
        tp: ranks to divide it over; other fields of `EngineConfig` as further keywords (`split`, `dtype`, `kv_dtype`,
            `max_model_len`, `kv_memory_gb`, `max_batch`, `device`, ...).

    Attributes:
        tokenizer: of the directory; None where it has none, and prompts are token ids.
        info: what the engine is.

    Raises:
        FormatError, ConfigError: the model or the division cannot be used.
        MachineError: a rank did not start, or memory is short.
        MissingExtraError: the package `tokenizers` is not installed.
    """

    def __init__(self, model: str | os.PathLike[str], *, tp: int | None = None, **options: object) -> None:
        given = {"model": os.fspath(model), "tp": tp, **options}
        self._config = check_config(EngineConfig, {name: value for name, value in given.items() if value is not None})
        self.tokenizer: TextTokenizer | None = _tokenizer(self._config.model)
        self._template: ChatTemplate | None = None  # loaded when it is first needed
        self._engine = Engine(self._config)
        self._desk = Desk(self._engine, self.tokenizer, most=min(2 * self._config.max_batch, self._config.max_queue))

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer prompts, as many at a time as the engine takes.

        Args:
            prompts: texts, or lists of token ids; or one of either.
            params: for all, or one for each prompt.
            n: answers to each prompt; with a seed, answer i is drawn with seed + i.
            progress: show a bar on standard error.

        Returns:
            A completion per prompt, in their order.

        Raises:
            ConfigError: a prompt cannot be answered here; nothing has been generated then.
            MachineError: a rank is dead or does not answer.
        """
        asked = _listed(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in asked]
        return self._complete([self.encode(prompt) for prompt in asked], params, n=n, progress=progress, texts=texts)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer a conversation, or several.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, or a list of such lists.
            params, n, progress: as for `generate`.

        Raises:
            FormatError: the model has no chat template.
            ConfigError: the template refuses a conversation, or it cannot be answered here.
        """
        first = messages[0] if messages else None
        several: Sequence[Sequence[Message]] = [messages] if isinstance(first, Mapping) else messages  # type: ignore
        return self._complete([self.chat_prompt(each) for each in several], params, n=n, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TextDelta]:
        """Answer one prompt piece by piece. Closing the iterator ends the request.

        Raises:
            ConfigError: the prompt cannot be answered here.
            MachineError: a rank is dead or does not answer.
        """
        ids, params = self.encode(prompt), params or SamplingParams()
        self._engine.check(ids, params)
        return self._deltas(Job(0, ids, params))

    def answer(self, jobs: Iterable[Job]) -> Generator[list[News]]:
        """Answer prompts as they come, in the steps in which news come: what the methods above are made of.

        Raises:
            MachineError: a rank is dead or does not answer.
        """
        return self._desk.answer(jobs)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt. An empty text is the begin of a document."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise ConfigError("the model has no tokenizer.json, so prompts are token ids", where=self._config.model)
        start = self.info.bos_id if self.info.bos_id is not None else self.tokenizer.eos_id
        return tuple(self.tokenizer.encode(prompt)) or (start,)

    def chat_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt that the model's chat template makes of a conversation.

        Raises:
            FormatError: the model has no chat template.
            ConfigError: the template refuses the conversation.
        """
        if self._template is None:
            if self.tokenizer is None:
                raise FormatError("a conversation needs tokenizer.json and a chat template", where=self._config.model)
            self._template = load_chat_template(self._config.model, self.tokenizer)
        return tuple(self._template.prompt_ids(messages))

    def stats(self) -> EngineStats:
        """Counts since the start, and how things stand."""
        return self._engine.stats()

    def close(self) -> None:
        """End the other ranks and let go of the memory; harmless twice."""
        if self._template is not None:
            self._template.close()
            self._template = None
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deltas(self, job: Job) -> Generator[TextDelta]:
        with closing(self.answer([job])) as steps:
            for step in steps:
                for news in step:
                    yield news.delta

    def _complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        n: int,
        progress: bool,
        texts: Sequence[str | None] | None = None,
    ) -> list[Completion]:
        if not 1 <= n <= _MAX_N:
            raise ConfigError(f"n must be a whole number from 1 to {_MAX_N}, got {n}")
        each = _for_each(params, len(prompts))
        for place, (prompt, its) in enumerate(zip(prompts, each, strict=True)):
            try:
                self._engine.check(prompt, its)
            except ConfigError as error:
                raise ConfigError(error.what, where=f"prompt {place}", why=error.why, hint=error.hint) from error
        drafts = [Draft() for _ in range(len(prompts) * n)]
        jobs = (
            Job(place * n + i, prompt, _reseeded(its, i))
            for place, (prompt, its) in enumerate(zip(prompts, each, strict=True))
            for i in range(n)
        )
        for news in self._news(jobs, len(drafts), progress):
            drafts[news.job.key].push(news.output, news.delta)
        answers = [drafts[place * n : (place + 1) * n] for place in range(len(prompts))]
        return [
            completion(text, prompt, its)
            for text, prompt, its in zip(texts or [None] * len(prompts), prompts, answers, strict=True)
        ]

    def _news(self, jobs: Iterator[Job], total: int, progress: bool) -> Iterator[News]:
        if not progress:
            for step in self.answer(jobs):
                yield from step
            return
        num_tokens = 0
        with progress_bar("generate", total, "prompts") as bar:
            for step in self.answer(jobs):
                num_tokens += sum(len(news.delta.token_ids) for news in step)
                bar.advance(sum(news.delta.finish is not None for news in step), tokens=num_tokens)
                yield from step


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise ConfigError(f"{len(params)} sets of sampling parameters for {num_prompts} prompts", hint="one for each")
    return list(params)


def _reseeded(params: SamplingParams, i: int) -> SamplingParams:
    """For answer i: another seed where there is one; without, each request takes a fresh one anyway."""
    return params if params.seed is None or i == 0 else replace(params, seed=(params.seed + i) % (MAX_SEED + 1))


def _tokenizer(directory: Path) -> TextTokenizer | None:
    return load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None
