"""`skymoe chat`: the conversation, the commands, and a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from generate import chatty

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from skymoe.base.errors import ConfigError, FormatError
from skymoe.chat.config import ChatConfig
from skymoe.chat.conversation import Conversation
from skymoe.chat.run import Chat, run
from skymoe.data.text_stream import for_terminal
from skymoe.engine.config import EngineConfig
from skymoe.engine.llm import LLM
from skymoe.engine.params import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty.write(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, max_batch=1) as llm:
        yield llm


def config(model: Path, **changes: Any) -> ChatConfig:
    return ChatConfig(engine=EngineConfig(model=model), **{"max_tokens": 6, "temperature": 0, **changes})


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """A user who types these lines, presses Ctrl-C (KeyboardInterrupt), and goes (Ctrl-D)."""
    coming = iter(lines)

    def ask(_: str) -> str:
        line = next(coming, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return ask


def talk(llm: LLM, asked: ChatConfig, *lines: str | type[BaseException]) -> tuple[list[dict[str, str]], str]:
    """What the conversation is in the end, and what was shown."""
    shown: list[str] = []
    chat = Chat(asked, llm, shown.append)
    chat.talk(typed(*lines))
    return chat._said.messages, "".join(shown)


def test_answers_stay_in_the_conversation(llm: LLM, model: Path) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, top_p=0.95)
    told = [{"role": "system", "content": "be brief"}]
    for question in ("the fox", "quick"):
        told.append({"role": "user", "content": question})
        (completion,) = llm.chat(told, params)
        told.append({"role": "assistant", "content": completion.text})
    said, shown = talk(llm, config(model, system="be brief"), "the fox", "", "quick")
    assert said == told
    assert for_terminal(told[2]["content"]) in shown and for_terminal(told[4]["content"]) in shown


def test_commands(llm: LLM, model: Path) -> None:
    said, _ = talk(llm, config(model), "the fox", "/reset")
    assert said == []
    said, _ = talk(llm, config(model), "the fox", "/system be kind", "quick")
    assert [message["content"] for message in said[:2]] == ["be kind", "quick"] and len(said) == 3
    said, _ = talk(llm, config(model, system="x"), "/system")
    assert said == []
    once, _ = talk(llm, config(model, temperature=1, seed=3), "the fox")
    again, _ = talk(llm, config(model, temperature=1, seed=3), "the fox", "/again")
    assert len(again) == 2 and again[0] == once[0] and again != once  # the seed of the second answer
    _, shown = talk(llm, config(model), "/what")
    assert "/reset" in shown and "/exit" in shown
    said, _ = talk(llm, config(model), "/exit", "never read")
    assert said == []
    said, _ = talk(llm, config(model), "one\\", "two")
    assert said[0]["content"] == "one\ntwo"


def test_ctrl_c_at_the_prompt_leaves_the_second_time(llm: LLM, model: Path) -> None:
    said, shown = talk(llm, config(model), KeyboardInterrupt, "the fox", KeyboardInterrupt, KeyboardInterrupt, "no")
    assert [message["content"] for message in said][:1] == ["the fox"] and len(said) == 2
    assert shown.count("once more leaves") == 2


def test_what_is_forgotten_is_said(llm: LLM, model: Path) -> None:
    said, shown = talk(llm, config(model, system="be brief"), "the fox " * 30, "brown " * 30, "quick " * 30, "last")
    assert "turns are forgotten" in shown
    assert said[0]["role"] == "system" and said[1]["role"] == "user" and said[-2]["content"] == "last"
    said, shown = talk(llm, config(model), "fox " * 300, "the fox")
    assert "there is room for" in shown and [message["content"] for message in said][0] == "the fox"


def test_forgetting_takes_the_oldest_question_with_its_answer() -> None:
    said = Conversation("s", [{"role": role, "content": "x" * 10} for role in ("user", "assistant") * 3])
    said.ask("q")
    ids, num_forgotten = said.prompt(lambda messages: tuple(range(sum(len(m["content"]) for m in messages))), 45)
    assert len(ids) == 42 and num_forgotten == 2 and said.turns[0]["role"] == "user"
    with pytest.raises(ConfigError, match="room for 1"):
        said.prompt(lambda messages: (1, 2), 1)


def test_a_model_without_a_template_is_refused_before_the_first_question(tmp_path: Path) -> None:
    path = chatty.write(tmp_path, template=False)
    with pytest.raises(FormatError, match="chat template"):
        run(config(path), ask=typed("never read"))


class Terminal:
    """`skymoe chat` behind a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "skymoe", "chat", *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._fd, self.shown, self._read_to = ours, "", 0

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str) -> str:
        """What is shown up to `pattern`."""
        deadline = time.monotonic() + 120
        while not (found := re.compile(pattern).search(self.shown, self._read_to)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._fd], [], [], 1.0)[0]:
                self.shown += os.read(self._fd, 4096).decode("utf-8", "replace")
        text, self._read_to = self.shown[self._read_to : found.end()], found.end()
        return text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_in_a_terminal_ctrl_c_stops_the_answer_and_a_second_one_leaves(model: Path) -> None:
    terminal = Terminal(str(model), "--set", "engine.max_model_len=200", "--temperature", "0", "--tp", "2")
    try:
        terminal.expect("> ")
        terminal.type("hello\n")
        terminal.expect(r"hello\r?\n..")
        terminal.process.send_signal(signal.SIGINT)
        terminal.expect(r"once more leaves\)\r?\n> ")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(120) == 0
        assert "\x1b[31m" not in terminal.shown and "Traceback" not in terminal.shown
    finally:
        terminal.close()
