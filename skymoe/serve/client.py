"""EngineClient: the engine's process, and the server's end of the wire to it.

The engine is a child process behind a socket pair (`engine/messages.py` says what goes over it). One task reads what it
says and hands each output to the channel of its request. A channel that is closed before its end tells the engine to
forget its requests, which frees its pages before the next step; that is how a client that went away is noticed there.
When the engine ends, by an error of its own, `kill -9` or a broken frame, every channel fails with the same EngineDied,
and `died` says which process it was and how it ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence

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
    worker_command,
)
from skymoe.engine.output import EngineInfo, EngineStats, Finish, TokenOutput
from skymoe.engine.params import SamplingParams
from skymoe.parallel.lifeline import LAUNCHER

_READ_BYTES = 1 << 18
_STOP_S = 5.0  # in all, from being told to being killed
_GRACE_S = 2.0


class EngineDied(MachineError):
    """The engine's process is gone. `code` is what the server's own process should end with."""

    def __init__(self, what: str, *, where: object = "", why: str = "", hint: str = "", code: int = 3) -> None:
        super().__init__(what, where=where, why=why, hint=hint)
        self.exit_code = code


class Channel:
    """Requests that belong together, and their outputs as they come, those of all in one stream.

    Close it, read to the end or not (`contextlib.aclosing`): what has not ended then is aborted.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._queue: asyncio.Queue[TokenOutput | EngineDied] = asyncio.Queue()
        self._open: set[str] = set()

    def submit(self, request_id: str, prompt: tuple[int, ...], params: SamplingParams) -> None:
        """Hand a request to the engine; `request_id` is new to it. Raises EngineDied."""
        self._client.add(request_id, prompt, params, self)
        self._open.add(request_id)

    def forget(self, request_id: str) -> None:
        """Abort a request; nothing happens when it has ended."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._client.abort(request_id)

    def push(self, news: TokenOutput | EngineDied) -> None:
        """For the client: what the engine says."""
        self._queue.put_nowait(news)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        """Raises EngineDied."""
        while self._open:
            news = await self._queue.get()
            if isinstance(news, EngineDied):
                self._open.clear()
                raise news
            if news.request_id in self._open:
                if news.finish is not None:
                    self._open.discard(news.request_id)
                return news
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort what has not ended."""
        for request_id in list(self._open):
            self.forget(request_id)


class EngineClient:
    """The server's view of one engine process.

    Args:
        config: what the engine is to load.
        command: what to run, the number of the inherited socket at its end; default: the worker of `skymoe.engine`.

    Attributes:
        info: what the engine is; None while it loads.
        loaded: layers that are read, and all of them.
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
        self._channels: dict[str, Channel] = {}
        self._asked: list[asyncio.Future[EngineStats]] = []
        self._stopping = False

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._channels)

    async def start(self) -> None:
        """Start the process and tell it what to load; `ready` is set when it has."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _start_process(self._command, theirs)
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._task = asyncio.create_task(self._listen())
        self._say(Start(self._config))

    def channel(self) -> Channel:
        """A new stream of outputs."""
        return Channel(self)

    def add(self, request_id: str, prompt: tuple[int, ...], params: SamplingParams, channel: Channel) -> None:
        """Hand a request to the engine; its outputs go to `channel`. Raises EngineDied."""
        if self.died.done():
            raise self.died.result()
        self._say(Add(request_id, prompt, params))
        self._channels[request_id] = channel

    def abort(self, request_id: str) -> None:
        """Tell the engine to forget a request; nothing happens when it has ended."""
        if self._channels.pop(request_id, None) is not None:
            self._say(Abort(request_id))

    def abort_all(self) -> None:
        """End every request; their channels hear of it."""
        for request_id, channel in list(self._channels.items()):
            self.abort(request_id)
            channel.push(TokenOutput(request_id=request_id, finish=Finish.ABORT))

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
        """End the process: asked first, then made to. While it loads it does not listen, and has nothing to finish."""
        self._stopping = True
        self._say(Stop())
        if self.ready.is_set():
            await asyncio.wait([self._task], timeout=_STOP_S)
        self.kill()
        await self._task
        self._writer.close()

    def kill(self) -> None:
        """End the process at once, whatever it does; `died` is done soon after. Its followers end with it."""
        self._process.kill()

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
        channel = self._channels.get(output.request_id)
        if channel is None:  # forgotten a moment ago
            return
        if output.finish is not None:
            del self._channels[output.request_id]
        channel.push(output)

    async def _end(self) -> int:
        """See that the process is gone; its exit code."""
        try:
            return await asyncio.to_thread(self._process.wait, _STOP_S if self._stopping else _GRACE_S)
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
        for channel in set(self._channels.values()):
            channel.push(reason)
        self._channels.clear()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(reason)
        self._asked.clear()


def _start_process(command: Sequence[str] | None, theirs: socket.socket) -> subprocess.Popen[bytes]:
    """The engine in a session of its own, so that Ctrl-C reaches the server alone; it dies with the server."""
    arguments = worker_command(theirs.fileno()) if command is None else [*command, str(theirs.fileno())]
    try:
        return subprocess.Popen(
            arguments,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is the server's: `ready http://..`
            env={**os.environ, LAUNCHER: str(os.getpid())},
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"the engine's process cannot be started: {printable(error)}") from error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
