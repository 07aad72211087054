"""A page in a browser here, whose name its owner makes mean 127.0.0.1: without a key the name gives it away."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve.servers import KEY, Running, make_model, server

from skymoe.serve.safety import is_our_host

OURS = ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "10.1.2.3:1", "localhost:"]
OTHERS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", ":8000", "::1",
          "127.0.0.1@evil.example", "localhost:80:80", "localhost:x", "[localhost]", "[127.0.0.1]", "[::1", "[::1]x",
          "localhost evil.example", "localhost,evil.example", "2130706433", "0x7f.1", "\xb9.0.0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "fox")


@pytest.fixture(scope="module")
def keyless(model: Path) -> Iterator[Running]:
    with server(model, key="", host="localhost") as running:
        yield running


def ask(running: Running, head: str) -> bytes:
    with socket.create_connection(("localhost", running.port), timeout=20) as connection:
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        heard = b""
        while part := connection.recv(1 << 16):
            heard += part
    return heard


@pytest.mark.parametrize("host", OURS)
def test_own_names_are_ours(host: str) -> None:
    assert is_our_host(host, "127.0.0.1")


@pytest.mark.parametrize("host", OTHERS)
def test_other_names_are_not(host: str) -> None:
    assert not is_our_host(host, "127.0.0.1")


def test_the_name_that_was_asked_for_is_ours() -> None:
    assert is_our_host("Box.Example:8000", "box.example") and not is_our_host("box.example", "0.0.0.0")


@pytest.mark.parametrize("path", ["/", "/health", "/stats", "/v1/models", "/openapi.json", "/static/x", "/nope"])
def test_dns_rebinding_421(keyless: Running, path: str) -> None:
    """No route at all answers to a foreign name, open ones included."""
    for host in ("evil.example", f"evil.example:{keyless.port}", ""):
        answer = ask(keyless, f"GET {path} HTTP/1.1\r\nHost: {host}")
        head, body = answer.split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 421 ") and b"x-content-type-options: nosniff" in head
        assert json.loads(body)["error"]["code"] == "unknown_host"
    for host in (f"localhost:{keyless.port}", "127.0.0.1", "[::1]:1"):
        assert not ask(keyless, f"GET {path} HTTP/1.1\r\nHost: {host}").startswith(b"HTTP/1.1 421 ")
    assert not ask(keyless, f"GET {path} HTTP/1.0").startswith(b"HTTP/1.1 421 ")


def test_a_foreign_name_reaches_no_model(keyless: Running) -> None:
    url, body = f"{keyless.url}/v1/completions", {"prompt": "the fox", "max_tokens": 2}
    assert httpx.post(url, json=body, headers={"Host": "evil.example"}, trust_env=False).status_code == 421
    assert httpx.post(url, json=body, trust_env=False).status_code == 200
    document = httpx.get(f"{keyless.url}/openapi.json", trust_env=False).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert operations and all("421" in operation["responses"] for operation in operations)


def test_with_a_key_any_name_will_do(model: Path) -> None:
    with server(model) as running:
        for host in ("evil.example", ""):
            answer = ask(running, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}")
            assert re.match(rb"HTTP/1\.1 200 ", answer)
