"""`skymoe chat DIR`: talk with a model in the terminal.

The answer appears as it is written, and stays in the conversation. Ctrl-C stops the answer, which stays as far as it
came; a second one, at the prompt, leaves. When the conversation outgrows the model's context, the oldest questions are
forgotten with their answers, and that is said. What a model writes never reaches the terminal as a command: control
characters are shown, not sent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.base.log import logger
from skymoe.chat.config import ChatConfig
from skymoe.chat.conversation import Conversation
from skymoe.data.text_stream import for_terminal
from skymoe.engine.llm import LLM
from skymoe.engine.output import Finish
from skymoe.engine.params import MAX_SEED, SamplingParams

HELP = """\
  /reset          forget the conversation
  /system TEXT    what the model is told first; alone: nothing. Forgets the conversation
  /again          another answer to the last question
  /exit           leave; so does the end of the input (Ctrl-D)
  a line that ends with \\ goes on in the next; Ctrl-C stops an answer"""
_ROOM_FOR_ANSWER = 16  # tokens, at least


@dataclass(frozen=True)
class ChatReport:
    """What was said: answers given, tokens written, and how fast."""

    num_answers: int
    generation_tokens: int
    seconds: float


def run(
    config: ChatConfig, *, ask: Callable[[str], str] = input, write: Callable[[str], None] | None = None
) -> ChatReport:
    """Talk until the user leaves.

    Args:
        config: model, sampling, what the system says.
        ask: shows a prompt and gives a line; raises EOFError at the end of the input.
        write: shows a piece of text.

    Raises:
        FormatError, ConfigError, MachineError: the model cannot be loaded, or has no chat template.
    """
    with LLM(**config.engine.model_dump(mode="json", exclude_none=True)) as llm:
        chat = Chat(config, llm, write or _write)
        chat.check()
        chat.talk(ask)
        return ChatReport(chat.num_answers, chat.num_tokens, chat.seconds)


class Chat:
    """One conversation.

    Attributes:
        num_answers, num_tokens, seconds: written so far, and the time that took.
    """

    def __init__(self, config: ChatConfig, llm: LLM, write: Callable[[str], None]) -> None:
        self._config, self._llm, self._write = config, llm, write
        self._said = Conversation(config.system)
        self.num_answers = self.num_tokens = 0
        self.seconds = 0.0

    def check(self) -> None:
        """Raises FormatError where there is no template, ConfigError where it does not take what the system says."""
        self._llm.chat_prompt([*self._said.messages, {"role": "user", "content": "hello"}])

    def talk(self, ask: Callable[[str], str]) -> None:
        """Question and answer until the user leaves."""
        interrupts = 0
        while interrupts < 2:
            try:
                text = _line(ask)
                interrupts = 0
                if not self._turn(text):
                    return
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                interrupts += 1
                self._write("\n(Ctrl-C once more leaves)\n" if interrupts == 1 else "\n")

    def _turn(self, text: str) -> bool:
        """What one line of the user asks for; False to leave."""
        command, _, rest = text.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self._said.reset()
        elif command == "/system":
            self._change_system(rest.strip() or None)
        elif command == "/again":
            self._again()
        elif command.startswith("/") and len(text.splitlines()) == 1:
            self._write(HELP + "\n")
        elif text.strip():
            self._said.ask(text)
            self._answer()
        return True

    def _change_system(self, text: str | None) -> None:
        before = self._said.system
        self._said.system = text
        self._said.reset()
        try:
            self.check()
        except ConfigError as error:
            self._said.system = before
            self._write(f"({error.what})\n")

    def _again(self) -> None:
        if len(self._said.turns) >= 2:
            self._said.turns.pop()
            self._answer()

    def _answer(self) -> None:
        """The model's turn. Ctrl-C ends it; what was written stays."""
        pieces: list[str] = []
        try:
            ids, num_forgotten = self._said.prompt(
                self._llm.chat_prompt, self._llm.info.max_model_len - _ROOM_FOR_ANSWER
            )
            if num_forgotten:
                self._write(f"(the oldest {num_forgotten} turns are forgotten: the context is full)\n")
            self._stream(ids, pieces)
        except ConfigError as error:
            self._write(f"({error.what}; {error.hint})\n" if error.hint else f"({error.what})\n")
        finally:
            self._said.answer("".join(pieces))

    def _stream(self, ids: tuple[int, ...], pieces: list[str]) -> None:
        begin, num_tokens = time.perf_counter(), 0
        stream = self._llm.stream(ids, self._params())
        try:
            for delta in stream:
                num_tokens += len(delta.token_ids)
                pieces.append(delta.text)
                self._write(for_terminal(delta.text))
                if delta.finish is Finish.ERROR:
                    self._write(f"\n({for_terminal(delta.error)})")
                elif delta.finish is Finish.LENGTH:
                    self._write(" ...")
            self._write("\n")
        finally:
            stream.close()
            seconds = time.perf_counter() - begin
            self.num_answers, self.num_tokens = self.num_answers + 1, self.num_tokens + num_tokens
            self.seconds += seconds
            logger.debug("%d tokens, %.1f tokens/s", num_tokens, num_tokens / seconds)

    def _params(self) -> SamplingParams:
        config = self._config
        seed = None if config.seed is None else (config.seed + self.num_answers) % (MAX_SEED + 1)
        return SamplingParams(
            max_tokens=config.max_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            min_p=config.min_p, repetition_penalty=config.repetition_penalty, seed=seed,
        )  # fmt: skip


def _line(ask: Callable[[str], str]) -> str:
    """A line, or several of which all but the last end with a backslash."""
    lines = [ask("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(ask("| "))
    return "\n".join(lines)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
