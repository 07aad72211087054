"""How long a body is: said twice, in a coding that nobody understands, or too long to wait for."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import pytest
from serve.servers import KEY, Running, make_model, server

BODY = b'{"prompt": "the fox", "max_tokens": 2}'
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = b"0\r\n\r\nGET /stats HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with server(make_model(tmp_path_factory.mktemp("serve") / "fox"), limits={"body_s": 60.0}) as running:
        yield running
        assert "Traceback" not in running.log()


def head(more: bytes, *, key: str = KEY) -> bytes:
    start = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n".encode()
    return start + b"Content-Type: application/json\r\n" + more + b"\r\n"


def talk(running: Running, *parts: bytes) -> list[tuple[int, bytes]]:
    """The answers, status and body, until the server closes; each part is sent when the one before is answered."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        heard = b""
        for part in parts:
            connection.sendall(part)
            heard += connection.recv(1 << 16)
        while more := connection.recv(1 << 16):
            heard += more
    answers = re.split(rb"(?=HTTP/1\.1 )", heard)[1:]
    return [(int(answer.split(b" ", 2)[1]), answer.split(b"\r\n\r\n", 1)[1]) for answer in answers]


def chunks(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("first", [b"", head(b"Content-Length: %d\r\n" % len(BODY)) + BODY])
def test_two_lengths_400(running: Running, order: int, first: bytes) -> None:
    """Also as a second request of a connection, where the one before has been answered."""
    both = b"".join([CHUNKED, b"Content-Length: %d\r\n" % len(SMUGGLED)][::order])
    answers = talk(running, *filter(None, (first, head(both) + SMUGGLED)))
    assert [status for status, _ in answers] == [200, 400][not first :]
    assert b"not both" in answers[-1][1]


@pytest.mark.parametrize("coding", [b"gzip", b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked", b""])
def test_other_codings_501(running: Running, coding: bytes) -> None:
    [(status, body)] = talk(running, head(b"Transfer-Encoding: %s\r\n" % coding) + chunks(BODY))
    assert status == 501
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error" and "`chunked`" in error["message"]


def test_chunks_are_understood(running: Running) -> None:
    for coding in (CHUNKED, CHUNKED.upper()):
        [(status, body)] = talk(running, head(coding + b"Connection: close\r\n") + chunks(BODY))
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("size", [b"200001", b"FFFFFFFF", b"f" * 20])
@pytest.mark.parametrize("before", [b"", b"1\r\n{\r\n"])
def test_a_chunk_that_announces_too_much_413(running: Running, size: bytes, before: bytes) -> None:
    """Refused when it is announced: the rest need not come, which would take until 408."""
    [(status, body)] = talk(running, head(CHUNKED) + before + size + b'\r\n{"prompt"')
    assert status == 413 and json.loads(body)["error"]["code"] == "body_too_large"


def test_a_request_has_one_answer(running: Running) -> None:
    """One that was refused before its body came is not refused again for its body."""
    for rest in (b"FFFFFFFF\r\n", b"zz\r\n"):
        answers = talk(running, head(CHUNKED, key="x" * 20), rest)
        assert [status for status, _ in answers] == [401]
