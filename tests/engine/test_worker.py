"""The engine's process from outside: what it says to what it hears, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.models import write_model

from skymoe.engine.config import EngineConfig
from skymoe.engine.messages import (
    Abort,
    Add,
    AskStats,
    Command,
    Failed,
    Inbox,
    Loading,
    News,
    Outputs,
    Ready,
    Start,
    Stats,
    Stop,
    pack,
    read_news,
    worker_command,
)
from skymoe.engine.output import EngineStats, Finish, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.parallel.lifeline import LAUNCHER

LIMIT_S = 120
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)


class Worker:
    """A worker and our end of its socket."""

    def __init__(self, config: EngineConfig) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(LIMIT_S)
        with theirs:
            self.process = subprocess.Popen(
                worker_command(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                env={**os.environ, LAUNCHER: str(os.getpid())},
                stderr=subprocess.DEVNULL,
            )
        self._inbox = Inbox(read_news)
        self._heard: list[News] = []
        self.loaded = (0, 0)
        self.say(Start(config))

    def say(self, *commands: Command) -> None:
        self.socket.sendall(b"".join(map(pack, commands)))

    def hear(self) -> News:
        """The next message after the model has been read."""
        while isinstance(news := self._next(), Loading):
            self.loaded = (news.done, news.total)
        return news

    def _next(self) -> News:
        while not self._heard:
            data = self.socket.recv(1 << 16)
            assert data, "the worker has ended"
            self._heard += self._inbox.feed(data)
        return self._heard.pop(0)

    def until(self, done: Callable[[TokenOutput], bool]) -> list[TokenOutput]:
        """Outputs up to the first that is `done`."""
        heard: list[TokenOutput] = []
        while not (heard and done(heard[-1])):
            news = self.hear()
            assert isinstance(news, Outputs), news
            heard += news.outputs
        return heard

    def stats(self) -> EngineStats:
        self.say(AskStats())
        while not isinstance(news := self.hear(), Stats):
            assert isinstance(news, Outputs), news
        return news.stats

    def end(self) -> int:
        return self.process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("worker") / "model", "mixtral")


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start_one(model: Path, **options: Any) -> Worker:
        started.append(Worker(EngineConfig(model=model, **{"page_size": 4, **options})))
        return started[-1]

    yield start_one
    for worker in started:
        worker.process.kill()
        worker.process.wait()
        worker.socket.close()


def tokens(outputs: list[TokenOutput], name: str) -> list[int]:
    return [o.token_id for o in outputs if o.request_id == name and o.token_id is not None]


def is_end_of(name: str) -> Callable[[TokenOutput], bool]:
    return lambda output: output.request_id == name and output.finish is not None


def test_a_conversation_with_a_worker(model: Path, start: Callable[..., Worker]) -> None:
    worker = start(model, max_model_len=100)
    ready = worker.hear()
    assert isinstance(ready, Ready) and ready.info.name == "model" and ready.info.vocab_size == 97
    assert worker.loaded == (3, 3)

    worker.say(Add("a", (5, 6, 7), GREEDY))
    alone = worker.until(is_end_of("a"))
    assert len(tokens(alone, "a")) == 6 and alone[-1].finish is Finish.LENGTH and alone[0].num_cached_tokens == 0

    # what cannot be answered ends its own request, with the reason, and nothing else
    bad = {
        "long": Add("long", (1,) * 100, GREEDY),
        "token": Add("token", (97,), GREEDY),
        "empty": Add("empty", (), GREEDY),
        "bias": Add("bias", (1,), SamplingParams(logit_bias={97: 1.0})),
        "x": Add("x", (1,), ENDLESS),
    }
    worker.say(*bad.values(), Add("x", (2,), GREEDY), Add("b", (5, 6, 7), GREEDY))
    heard = worker.until(is_end_of("b"))
    assert tokens(heard, "b") == tokens(alone, "a")
    errors = {o.request_id: o.error for o in heard if o.finish is Finish.ERROR}
    assert errors.keys() == {"long", "token", "empty", "bias", "x"}
    assert "100 tokens" in errors["long"] and "97" in errors["token"] and "answered already" in errors["x"]

    # the first x goes on; an abort is answered, frees its pages at once, and is answered once
    assert worker.stats().num_running == 1
    worker.say(Abort("x"), Abort("x"), Abort("unknown"))
    assert [o.finish for o in worker.until(is_end_of("x")) if o.finish] == [Finish.ABORT]
    stats = worker.stats()
    assert stats.num_running == 0 and stats.free_pages == stats.num_pages > 0
    assert stats.generation_tokens > 12 and sum(map(sum, stats.expert_tokens)) > 0

    worker.process.send_signal(signal.SIGINT)  # Ctrl-C in a terminal reaches all; the server decides
    worker.say(Add("c", (5, 6, 7), GREEDY))
    assert tokens(worker.until(is_end_of("c")), "c") == tokens(alone, "a")
    worker.say(Add("d", (5,), ENDLESS), Stop())
    assert worker.end() == 0


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start(tmp_path / "nowhere")
    failed = worker.hear()
    assert isinstance(failed, Failed) and failed.exit_code == 2 and "nowhere" in failed.where
    assert worker.end() == 2


@pytest.mark.slow
def test_it_ends_when_the_server_closes_the_socket(model: Path, start: Callable[..., Worker]) -> None:
    worker = start(model)
    assert isinstance(worker.hear(), Ready)
    worker.say(Add("a", (5,), ENDLESS))
    worker.socket.close()
    assert worker.end() == 0


@pytest.mark.slow
def test_what_is_no_message_ends_it(model: Path, start: Callable[..., Worker]) -> None:
    worker = start(model)
    assert isinstance(worker.hear(), Ready)
    worker.socket.sendall(struct.pack(">I", 2) + b"{}")
    failed = worker.hear()
    assert isinstance(failed, Failed) and "message" in failed.what
    assert worker.end() == 2


def test_a_dead_rank_is_named_also_while_nothing_runs(model: Path, start: Callable[..., Worker]) -> None:
    worker = start(model, tp=2)
    ready = worker.hear()
    assert isinstance(ready, Ready) and ready.info.num_ranks == 2
    (follower,) = children(worker.process.pid)
    os.kill(follower, signal.SIGKILL)
    failed = worker.hear()
    assert isinstance(failed, Failed) and failed.exit_code == 3 and "rank 1" in failed.what and "SIGKILL" in failed.what
    assert worker.end() == 3


@pytest.mark.slow
def test_a_rank_that_dies_at_work_is_named(model: Path, start: Callable[..., Worker]) -> None:
    worker = start(model, tp=2, max_model_len=120)
    assert isinstance(worker.hear(), Ready)
    worker.say(*(Add(f"{i}", (5, i + 1), ENDLESS) for i in range(40)))
    assert isinstance(worker.hear(), Outputs)
    (follower,) = children(worker.process.pid)
    os.kill(follower, signal.SIGKILL)
    while isinstance(news := worker.hear(), Outputs):
        pass
    assert isinstance(news, Failed) and news.exit_code == 3 and "rank 1" in news.what
    assert worker.end() == 3


def test_no_process_outlives_a_worker_that_is_killed(model: Path, start: Callable[..., Worker]) -> None:
    worker = start(model, tp=2)
    assert isinstance(worker.hear(), Ready)
    (follower,) = children(worker.process.pid)
    worker.process.kill()
    worker.end()
    deadline = time.monotonic() + LIMIT_S
    while is_alive(follower):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
