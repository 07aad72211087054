"""EngineClient: the engine's process, and the server's end of the wire to it.

The engine is a child process behind a socket pair (`engine/messages.py` says what goes over it). One task reads what it
says and hands each output to the stream of its request. A stream that is closed before its end tells the engine to
forget the request, which frees its pages before the next step; that is how a client that went away is noticed there.
When the engine ends, by an error of its own, `kill -9` or a broken frame, every stream fails with the same EngineDied,
and `died` says which process it was and how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence

from skymoe.base.errors import FormatError, MachineError, printable
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
    worker_arguments,
)
from skymoe.engine.output import EngineInfo, EngineStats, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.parallel.lifeline import LAUNCHER

_READ_BYTES = 1 << 18
_STOP_S = 10.0
_SECRETS = ("SKYMOE_API_KEY",)


class EngineDied(MachineError):
    """The engine's process is gone. `code` is what the server's own process should end with."""

    def __init__(self, what: str, *, where: object = "", why: str = "", hint: str = "", code: int = 3) -> None:
        super().__init__(what, where=where, why=why, hint=hint)
        self.exit_code = code


class Stream:
    """The outputs of one request, as they come. Close it, read to the end or not: `with contextlib.aclosing(...)`."""

    def __init__(self, client: EngineClient, request_id: str) -> None:
        self.id = request_id
        self._client = client
        self._queue: asyncio.Queue[TokenOutput | EngineDied] = asyncio.Queue()
        self._ended = False

    def push(self, news: TokenOutput | EngineDied) -> None:
        """What the engine says of this request."""
        self._queue.put_nowait(news)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        """Raises EngineDied."""
        if self._ended:
            raise StopAsyncIteration
        news = await self._queue.get()
        if isinstance(news, EngineDied):
            self._ended = True
            raise news
        self._ended = news.finish is not None
        return news

    async def aclose(self) -> None:
        """Abort the request unless it has ended."""
        self._client.forget(self.id)


class EngineClient:
    """The server's view of one engine process.

    Args:
        config: what the engine is to load.
        command: what to run, the number of the inherited socket at its end; default: the worker of `skymoe.engine`.

    Attributes:
        info: what the engine is; None while it loads.
        loaded: bytes of weights that are read, and all of them.
        died: done when the engine has ended, with the reason.
        pid: of its process.
    """

    def __init__(self, config: EngineConfig, *, command: Sequence[str] | None = None) -> None:
        self.info: EngineInfo | None = None
        self.loaded = (0, 0)
        self.died: asyncio.Future[EngineDied] = asyncio.get_running_loop().create_future()
        self.ready: asyncio.Event = asyncio.Event()
        self._config = config
        self._command = command
        self._streams: dict[str, Stream] = {}
        self._asked: list[asyncio.Future[EngineStats]] = []
        self._stopping = False

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the process and tell it what to load; `ready` is set when it has."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _start_process(self._command, theirs)
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._task = asyncio.create_task(self._listen())
        self._say(Start(self._config))

    def submit(self, request_id: str, prompt: tuple[int, ...], params: SamplingParams) -> Stream:
        """Hand a request to the engine; raises EngineDied."""
        stream = Stream(self, request_id)
        if self.died.done():
            raise self.died.result()
        self._streams[request_id] = stream
        self._say(Add(request_id, prompt, params))
        return stream

    def forget(self, request_id: str) -> None:
        """Abort a request; nothing happens when it has ended."""
        if self._streams.pop(request_id, None) is not None:
            self._say(Abort(request_id))

    async def stats(self) -> EngineStats:
        """How things stand in the engine. Raises EngineDied."""
        if self.died.done():
            raise self.died.result()
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        if len(self._asked) == 1:  # one answer serves all who ask meanwhile
            self._say(AskStats())
        return await answer

    async def stop(self) -> None:
        """End the process: asked first, then made to."""
        self._stopping = True
        self._say(Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._task), _STOP_S)
        await self._end()
        self._writer.close()

    def _say(self, message: Command) -> None:
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def _listen(self) -> None:
        """Until the engine ends."""
        inbox: Inbox[News] = Inbox(read_news)
        reason: EngineDied | None = None
        try:
            while reason is None and (data := await self._reader.read(_READ_BYTES)):
                for news in inbox.feed(data):
                    reason = reason or self._hear(news)
        except ConnectionError:
            pass
        except FormatError as error:
            reason = EngineDied("the engine sent what no engine sends", why=str(error), code=70)
        code = await self._end()
        self._bury(reason or self._obituary(code))

    def _hear(self, news: News) -> EngineDied | None:
        match news:
            case Outputs():
                for output in news.outputs:
                    self._deliver(output)
            case Stats():
                waiting, self._asked = self._asked, []
                for answer in waiting:
                    if not answer.done():
                        answer.set_result(news.stats)
            case Loading():
                self.loaded = (news.done, news.total)
            case Ready():
                self.info = news.info
                self.ready.set()
            case Failed():
                return EngineDied(news.what, where=news.where, why=news.why, hint=news.hint, code=news.exit_code)
        return None

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:  # forgotten a moment ago
            return
        if output.finish is not None:
            del self._streams[output.request_id]
        stream.push(output)

    async def _end(self) -> int:
        """See that the process is gone; its exit code."""
        grace = _STOP_S if self._stopping else 2.0
        try:
            return await asyncio.to_thread(self._process.wait, grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)

    def _obituary(self, code: int) -> EngineDied:
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        hint = "" if self._stopping else "out of memory? look at what it said above, and at the kernel's log (dmesg)"
        return EngineDied(f"the engine (process {self._process.pid}) has ended: {how}", hint=hint)

    def _bury(self, reason: EngineDied) -> None:
        if not self.died.done():
            self.died.set_result(reason)
        for stream in self._streams.values():
            stream.push(reason)
        self._streams.clear()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(reason)
        self._asked.clear()


def _start_process(command: Sequence[str] | None, theirs: socket.socket) -> subprocess.Popen[bytes]:
    """The engine in a session of its own, so that Ctrl-C reaches the server alone; it dies with the server."""
    arguments = [sys.executable, *worker_arguments(theirs.fileno())]
    if command is not None:
        arguments = [*command, str(theirs.fileno())]
    try:
        return subprocess.Popen(
            arguments,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is the server's: `ready http://..`
            env=_environment(os.environ),
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"the engine's process cannot be started: {printable(error)}") from error


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What the engine may know: all but the secrets, and whose child it is."""
    return {name: value for name, value in ours.items() if name not in _SECRETS} | {LAUNCHER: str(os.getpid())}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


