"""Text to tokens and back, off the event loop.

A tokenizer takes a second for a megabyte, a chat template as long as its author lets it. Both run in threads; the
tokenizer is Rust and lets others run meanwhile (in batches only, `TextTokenizer.encoding`), so other requests go on.
Long texts wait for one another: one client with many of them cannot keep short ones from the threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from skymoe.base.errors import ConfigError, FormatError
from skymoe.base.log import logger
from skymoe.data.tokenizer import TextTokenizer, load_tokenizer
from skymoe.engine.chat_template import ChatTemplate, load_chat_template
from skymoe.engine.output import EngineInfo
from skymoe.engine.params import SamplingParams
from skymoe.engine.text import TextOutput
from skymoe.engine.token_text import TokenTexts
from skymoe.serve.errors import ApiError, refuse, too_long
from skymoe.serve.protocol.chat import ChatMessage

_THREADS = 4
_LONG = 32 * 1024  # characters

T = TypeVar("T")


class Texts:
    """The tokenizer and the chat template of a model directory.

    Args:
        directory: of the model; tokenizer and template come from nowhere else.

    Raises:
        FormatError: there is no tokenizer, or it or the template is broken.
    """

    def __init__(self, directory: Path, *, template_s: float) -> None:
        self.tokenizer: TextTokenizer = load_tokenizer(directory)
        _ = self.tokenizer.bytes_by_id  # parses the vocabulary, once, now
        self._template, self._no_template = _find_template(directory, self.tokenizer, template_s)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")
        self._template_pool = ThreadPoolExecutor(1, thread_name_prefix="template")
        self._long = asyncio.Semaphore(1)
        self._tokens = TokenTexts(self.tokenizer)

    async def encode(self, text: str, *, special: bool, info: EngineInfo) -> list[int]:
        """The tokens of a prompt. One without any is the begin token, else the end token, as OpenAI has it.

        Raises:
            ApiError: 400, it is longer than the context.
        """
        ids = await self._away(len(text), lambda: self._bounded(text, special, info.max_model_len))
        first = info.bos_id if info.bos_id is not None else self.tokenizer.eos_id
        return ids or [first]

    def _bounded(self, text: str, special: bool, most: int) -> list[int]:
        encoding = self.tokenizer.encoding(text, special=special)
        if len(encoding) > most:  # a list of a million numbers takes longer than others should wait
            raise too_long(len(encoding), most)
        return list(encoding.ids)

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text, none for none."""
        return await self._away(len(text), lambda: self.tokenizer.encode(text, special=special))

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return await self._away(len(ids), lambda: self.tokenizer.decode(ids))

    async def chat(self, messages: Sequence[ChatMessage], *, open_answer: bool = True) -> list[int]:
        """The tokens of a conversation; `open_answer`: up to where the model is to speak.

        Raises:
            ApiError: 400, the model has no template, or it refuses the conversation.
        """
        template = self._template
        if template is None:
            raise ApiError(400, self._no_template, param="messages", code="no_chat_template")
        said = [_plain(message) for message in messages]
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._template_pool, lambda: template.prompt_ids(said, add_generation_prompt=open_answer)
            )
        except ConfigError as error:
            refuse(error, param="messages", code="template_refused")

    async def names(self, ids: Sequence[int]) -> list[str]:
        """Each token as text."""
        return await self._away(len(ids), lambda: [self._tokens.of(number).text for number in ids])

    def output(self, prompt: Sequence[int], params: SamplingParams, *, offset: int = 0) -> TextOutput:
        """What makes text of the tokens of one completion."""
        return TextOutput(self.tokenizer, prompt, params, offset=offset)

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._template_pool.shutdown(wait=False, cancel_futures=True)
        if self._template is not None:
            self._template.close()

    async def _away(self, size: int, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            if size <= _LONG:
                return await loop.run_in_executor(self._pool, work)
            async with self._long:
                return await loop.run_in_executor(self._pool, work)
        except FormatError as error:
            refuse(error)


def _find_template(directory: Path, tokenizer: TextTokenizer, seconds: float) -> tuple[ChatTemplate | None, str]:
    """The template, or why there is none: models that were never taught to chat have none."""
    try:
        return load_chat_template(directory, tokenizer, timeout_s=seconds), ""
    except FormatError as error:
        logger.info(f"no chat completions: {error.what}")
        return None, error.what


def _plain(message: ChatMessage) -> dict[str, str]:
    """As templates expect it."""
    said = {"role": message.role, "content": message.text}
    return said if message.name is None else said | {"name": message.name}
