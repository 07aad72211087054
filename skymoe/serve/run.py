"""`skymoe serve`: bind, start the engine, answer until a signal, the engine's end, or nobody's fault.

The order: the address is bound first, so that a port that is taken costs no loading; the engine starts and the server
answers `/health` while it loads; `ready http://..` appears on standard output when requests are answered. SIGTERM or
Ctrl-C lets nobody in any more, lets who is in finish for `drain_s`, and ends; an engine that has nothing left to do and
does not end by itself within seconds is killed. A second signal, at any time, kills the engine and ends at once. When
the engine's process ends, the server says how and ends with exit code 3.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from skymoe.base.errors import MachineError, printable
from skymoe.base.log import logger
from skymoe.serve.admission import Admission
from skymoe.serve.app import make_app
from skymoe.serve.client import EngineClient
from skymoe.serve.config import ServeConfig
from skymoe.serve.descriptors import ACCEPT_BURST, room_for
from skymoe.serve.http import BoundedProtocol
from skymoe.serve.metrics import Metrics
from skymoe.serve.safety import KEY_VARIABLE, Key, check_bind, is_loopback, read_key
from skymoe.serve.service import Service
from skymoe.serve.texts import Texts

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CLOSE_S = 2
_INTERRUPTED = 130
_BACKLOG = 2048


def run(config: ServeConfig, *, engine_command: Sequence[str] | None = None) -> int:
    """Serve until told to end; returns the exit code: 0 drained, 130 after a second signal.

    Args:
        config: what to serve, where, to whom.
        engine_command: what to start as the engine instead of ours; see `EngineClient`.

    Raises:
        ConfigError: the bind is public and there is no key; no model, no tokenizer.
        MachineError: the address cannot be bound; too few files may be open; the engine has ended (EngineDied).
    """
    key = read_key(config.api_key_file)
    os.environ.pop(KEY_VARIABLE, None)  # no child has use for it
    check_bind(config.host, has_key=key is not None, insecure=config.insecure_no_auth)
    if key is None and not is_loopback(config.host):
        logger.warning(f"{printable(config.host)} can be reached by other machines, and everybody may use this server")
    room = room_for(config.limits.connections)
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"connections": room})})
    with _bind(config.host, config.port) as listener:
        return asyncio.run(_Server(config, engine_command).serve(listener, key))


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens; raises MachineError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise MachineError(
            f"cannot listen on {printable(host)}:{port}: {error.strerror}", hint="--port 0 takes a free port"
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: ours decide. What waits in the kernel is more than one turn accepts."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_BACKLOG)  # asyncio has one number for both

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    """One run of the server: its parts, and the events that end it."""

    def __init__(self, config: ServeConfig, engine_command: Sequence[str] | None) -> None:
        self._config = config
        self._engine_command = engine_command
        self._told: asyncio.Future[signal.Signals]
        self._interrupted = False

    async def serve(self, listener: socket.socket, key: Key | None) -> int:
        """Until the end; the exit code."""
        service = self._make_service()
        http = self._make_http(service, key)
        self._told = asyncio.get_running_loop().create_future()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._hear, number, service, http)
        await service.engine.start()
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        announcing = asyncio.create_task(self._announce(service, _address(listener)))
        try:
            await self._until_end(service)
        finally:
            announcing.cancel()
            http.should_exit = True
            await asyncio.gather(serving, service.engine.stop())
            service.texts.close()
        return _INTERRUPTED if self._interrupted else 0

    def _hear(self, number: signal.Signals, service: Service, http: _Uvicorn) -> None:
        """A signal. The first is waited for in `_until_end`; the second ends whatever is waited for by then."""
        if not self._told.done():
            self._told.set_result(number)
            return
        self._interrupted = http.force_exit = True
        service.engine.kill()

    def _make_service(self) -> Service:
        config = self._config
        name = config.name or config.engine.model.resolve().name
        limits = config.limits
        most = config.engine.max_batch + limits.waiting
        queue = max(config.engine.max_queue, min(most, 1 << 20))  # who is let in here finds room there
        admission = Admission(max_requests=most, max_tokens=limits.tokens)
        return Service(
            config=config,
            name=name,
            engine=EngineClient(config.engine.model_copy(update={"max_queue": queue}), command=self._engine_command),
            texts=Texts(config.engine.model, template_s=limits.template_s),
            admission=admission,
            metrics=Metrics(name, admission),
        )

    def _make_http(self, service: Service, key: Key | None) -> _Uvicorn:
        limits = self._config.limits
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log what strangers send
        return _Uvicorn(
            uvicorn.Config(
                make_app(service, key=key),
                http=functools.partial(BoundedProtocol, limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=_CLOSE_S,
                backlog=ACCEPT_BURST,
            )
        )

    async def _announce(self, service: Service, address: str) -> None:
        await service.engine.ready.wait()
        print(f"ready {address}", flush=True)

    async def _until_end(self, service: Service) -> None:
        """Wait for a signal, then for who is in. Raises EngineDied."""
        died = service.engine.died
        either: set[asyncio.Future[Any]] = {self._told, died}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._told.done():
            raise died.result()
        service.admission.draining = True
        name = self._told.result().name
        logger.info(f"{name}: draining, {service.admission.requests} under way; again to end at once")
        empty = asyncio.create_task(service.admission.empty())
        ends: set[asyncio.Future[Any]] = {empty, died}
        await asyncio.wait(ends, timeout=self._config.drain_s, return_when=asyncio.FIRST_COMPLETED)
        empty.cancel()
        if self._interrupted:  # which is how the engine died
            return
        if died.done():
            raise died.result()
        if service.admission.requests:
            logger.warning(f"{service.admission.requests} requests did not end in {self._config.drain_s:g} s: aborted")
            service.engine.abort_all()
