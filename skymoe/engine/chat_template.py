"""A conversation -> the prompt, by the template in the model's directory. No torch.

Chat models are trained on one exact way of writing a conversation, and it is kept beside the weights as a Jinja
template. Templates come from there only, never from a request: a template is a program. It runs in a process of its
own under limits of time, memory and output (`chat_process`, `chat_render`), and special tokens that a client writes are
text (`chat_tokens`). All else comes out as from transformers' `apply_chat_template`.

Beside the default template, `tool_use` is used for conversations with tools, as in transformers.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from skymoe.base.errors import ConfigError, FormatError, printable
from skymoe.data.tokenizer import TextTokenizer
from skymoe.engine.chat_files import SPECIAL_TOKENS, find_templates, special_tokens
from skymoe.engine.chat_process import OverLimitError, RenderProcess
from skymoe.engine.chat_tokens import ChatTokens, check_text

MAX_CHARACTERS = 1 << 22
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", *SPECIAL_TOKENS})


class ChatTemplate:
    """The template of a model, ready to render.

    Safe to use from several threads; conversations are rendered one after the other. `close` ends its process, which
    also ends with this one.

    Args:
        sources: templates by name; one is "default".
        tokenizer: of the model.
        special: what the template knows as `bos_token` and so on.
        where: the file, named in errors.
        timeout_s: how long one render may take.

    Raises:
        FormatError: the template is not valid, or goes over a limit as it is read.
        MissingExtraError: the package `jinja2` is not installed.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: TextTokenizer,
        *,
        special: Mapping[str, str] | None = None,
        where: object = "",
        timeout_s: float = 2.0,
    ) -> None:
        self._special = dict(special or {})
        self._where = where
        self._names = frozenset(sources)
        self._tokens = ChatTokens(tokenizer, self._special.values())
        self._process = RenderProcess(
            {
                "templates": dict(sources),
                "tokens": self._tokens.texts,
                "nonce": self._tokens.nonce,
                "seconds": timeout_s,
                "characters": MAX_CHARACTERS,
            },
            where,
        )
        try:
            self._process.start()
            self._probe()
        except BaseException:
            self.close()
            raise

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, bool | int | float | str] | None = None,
    ) -> list[int]:
        """The prompt of a conversation.

        Args:
            messages: `role`, and `content` as a text, a list of parts of type text, or None; other fields as they are.
            add_generation_prompt: end with the beginning of the assistant's answer.
            tools: what the model may call, as JSON schemas.
            variables: more names for the template, such as `enable_thinking`.

        Raises:
            ConfigError: the messages are none, the template refuses them, or a limit is reached.
        """
        return self._tokens.ids(self._render(messages, add_generation_prompt, tools, variables))

    def text(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The same as text, to be read: here a client's `<|im_end|>` and the template's look alike."""
        return self._tokens.text(self._render(messages, add_generation_prompt, None, None))

    @property
    def process_id(self) -> int | None:
        """Of the process that renders, while it lives."""
        return self._process.pid

    def close(self) -> None:
        """End the process that renders."""
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, bool | int | float | str] | None,
    ) -> str:
        taken = _RESERVED & (variables or {}).keys()
        if taken:
            raise ConfigError(f"a template's variable cannot be called {printable(min(taken))}")
        for value in (messages, tools, variables):
            check_text(value)
        given = {
            **{name: self._tokens.guarded(value) for name, value in (variables or {}).items()},
            "messages": [{**self._tokens.guarded(m), "role": m["role"]} for m in map(_message, _some(messages))],
            "tools": self._tokens.guarded(None if tools is None else list(tools)),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        name = "tool_use" if tools and "tool_use" in self._names else "default"
        return self._process.render(name, given, self._special)

    def _probe(self) -> None:
        """Render a few conversations of random letters, and see which special tokens the template puts together."""
        for roles in (["user"], ["system", "user", "assistant", "user"], ["user", "assistant", "tool"], ["developer"]):
            words = ("".join(secrets.choice(string.ascii_lowercase) for _ in range(12)) for _ in roles)
            messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
            for name in sorted(self._names):
                given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
                try:
                    self._tokens.compose(self._process.render(name, given, self._special))
                except OverLimitError as error:
                    raise FormatError("the chat template cannot be used", where=self._where, why=error.why) from error
                except ConfigError:  # many templates refuse some of these; a client will be told as well
                    continue


def load_chat_template(directory: Path, tokenizer: TextTokenizer, *, timeout_s: float = 2.0) -> ChatTemplate:
    """The template of a model directory.

    Args:
        directory: the operator's.
        tokenizer: of the same directory.
        timeout_s: how long one render may take.

    Raises:
        NoTemplateError: there is none.
        FormatError: it is too large, no text, or as `ChatTemplate`.
        MissingExtraError: the package `jinja2` is not installed.
    """
    sources, where = find_templates(directory)
    special = special_tokens(directory)
    return ChatTemplate(sources, tokenizer, special=special, where=where, timeout_s=timeout_s)


def _some(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if not messages:
        raise ConfigError("a conversation needs at least one message")
    return messages


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As templates expect it: content as one text, arguments of calls as objects."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConfigError(f"a message's role is one of {', '.join(sorted(ROLES))}, got {role!r:.40}")
    if isinstance(content, (list, tuple)):
        content = "\n".join(map(_part, content))
    if content is not None and not isinstance(content, str):
        raise ConfigError("the content of a message is a text, or a list of parts of type text")
    made = {**message, "content": content}
    if isinstance(calls := message.get("tool_calls"), (list, tuple)):
        made["tool_calls"] = [_call(call) for call in calls]
    return made


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ConfigError('the parts of a message can only be {"type": "text", "text": ".."}')
    return text


def _call(call: Any) -> Any:
    """A call of a tool; OpenAI's clients send its arguments as JSON in a text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
