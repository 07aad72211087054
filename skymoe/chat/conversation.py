"""What has been said, and what of it the model still sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from skymoe.base.errors import ConfigError

Message = dict[str, str]


@dataclass
class Conversation:
    """Turns of user and assistant after what the system says.

    Attributes:
        system: what the model is told first; None says nothing.
        turns: question, answer, question, ...
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """The user says `text`."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The model said `text`; where it said nothing, the question is taken back."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def reset(self) -> None:
        """Forget all but what the system says."""
        self.turns.clear()

    @property
    def messages(self) -> list[Message]:
        """All of it, for the chat template."""
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return told + self.turns

    def prompt(self, encode: Callable[[list[Message]], tuple[int, ...]], room: int) -> tuple[tuple[int, ...], int]:
        """The prompt for the next answer, and how many of the oldest turns had to be forgotten for it.

        Args:
            encode: messages to tokens.
            room: the most tokens of the prompt.

        Raises:
            ConfigError: the last question alone is longer.
        """
        num_forgotten = 0
        while len(ids := encode(self.messages)) > room:
            if len(self.turns) < 3:
                raise ConfigError(f"this is {len(ids)} tokens, and there is room for {room}", hint="say less at once")
            del self.turns[:2]  # the oldest question with its answer: templates want them to alternate
            num_forgotten += 2
        return ids, num_forgotten
