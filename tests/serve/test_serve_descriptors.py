"""More connections than the server may open files: who is in is answered, who is too many is sent away at once."""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from serve.servers import Running, make_model, server, start

from skymoe.serve.cork import Cork

_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "fox")


def limited(folder: Path, soft: int, hard: int) -> dict[str, str]:
    """An environment in which Python starts with these limits of descriptors."""
    lines = ["import resource", f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"}


def limits_of(running: Running) -> tuple[int, int]:
    return resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)


@contextmanager
def silent(running: Running, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    with ExitStack() as stack:
        address = ("127.0.0.1", running.port)
        yield [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(count)]


def is_told_503(connection: socket.socket) -> bool:
    """And closed, long before its deadline."""
    heard = b""
    while part := connection.recv(1 << 16):
        heard += part
    return heard.startswith(b"HTTP/1.1 503 ")


def test_few_descriptors(model: Path, tmp_path: Path) -> None:
    """At `ulimit -n 128`, with 300 who say nothing."""
    with server(model, env=limited(tmp_path, 128, 128), limits={"header_s": 300.0, "idle_s": 300.0}) as running:
        told = re.search(r"may open 128 files here, so (\d+) connections are let in", running.log())
        assert told is not None
        room = int(told[1])
        assert 16 <= room < 128 and limits_of(running) == (128, 128)
        with silent(running, 1) as [first]:
            first.sendall(_HEALTH)
            assert first.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            with silent(running, 300) as others:
                assert all(is_told_503(connection) for connection in others[room - 1 :])
                for _ in range(3):  # who is in is answered; who comes is told that it is full
                    first.sendall(_HEALTH)
                    assert first.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
                    with silent(running, 1) as [late]:
                        assert is_told_503(late)
        deadline = time.monotonic() + 30
        while psutil.Process(running.process.pid).num_fds() > 128 - room:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 200
        assert not re.search("Traceback|accept|resource", running.log())
        assert running.end() == 0


def test_clients_that_reset_before_they_are_refused() -> None:
    """Gone between the answer and the end of our half, as far as the event loop knows it is still there."""

    async def reset() -> None:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Transport] = loop.create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                made.set_result(transport)

        async with await loop.create_server(Protocol, "127.0.0.1", 0) as listening:
            client = socket.create_connection(listening.sockets[0].getsockname())
            transport = await made
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            client.close()
            assert not transport.is_closing()
            Cork(transport, loop).write_eof()
            assert transport.is_closing()

    asyncio.run(reset())


def test_the_limit_of_descriptors_is_raised(model: Path, tmp_path: Path) -> None:
    """As far as is needed, when the hard limit has room."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with server(model, env=limited(tmp_path, 64, hard), limits={"connections": 200}) as running:
        soft, _ = limits_of(running)
        assert 200 < soft < 400 and "let in at once" not in running.log()
        with silent(running, 200) as connections:
            connections[-1].sendall(_HEALTH)
            assert connections[-1].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert running.end() == 0


def test_a_server_without_any_room_says_so(model: Path, tmp_path: Path) -> None:
    running = start(model, env=limited(tmp_path, 64, 64), ready=False)
    assert running.wait() == 3
    assert "may open 64 files here" in running.log() and "ulimit -n" in running.log()
