"""Hostile clients, one by one: who may enter, and what the protocol bears."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import ValidationError
from serve.servers import KEY, Running, engine_of, make_model, server, start

from skymoe.base.errors import ConfigError
from skymoe.serve import safety
from skymoe.serve.protocol.completions import CompletionRequest
from skymoe.serve.protocol.tokens import DetokenizeRequest
from skymoe.serve.safety import Key, check_bind, is_loopback, read_key

OPEN = {"/", "/health", "/ready", "/static/{name}"}
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "fox")


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    limits = {"header_s": 1.0, "body_s": 1.0, "idle_s": 2.0, "connections": 40}
    with server(model, engine={"fail": 77}, limits=limits) as running:
        yield running


def talk(running: Running, data: bytes, *, wait_s: float = 20) -> bytes:
    """What the server says to raw bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=wait_s) as connection:
        connection.sendall(data)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    heard = b""
    try:
        while part := connection.recv(1 << 16):
            heard += part
    except ConnectionResetError:
        pass
    return heard


def request(body: bytes, *, path: str = "/v1/completions", more: bytes = b"", close: bool = True) -> bytes:
    end = b"Connection: close\r\n" if close else b""
    length = b"" if b"chunked" in more or b"Content-Length" in more else b"Content-Length: %d\r\n" % len(body)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    return head + JSON + length + end + more + b"\r\n" + body


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer.split(b" ", 2)[1])


def check_alive(running: Running) -> None:
    with running.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 2})
    assert answer.status_code == 200 and running.process.poll() is None


# ---- who may enter


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.example.org", "128.0.0.1"])
def test_refuse_public_bind_without_key(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        check_bind(host, has_key=False, insecure=False)
    check_bind(host, has_key=True, insecure=False)
    check_bind(host, has_key=False, insecure=True)


def test_the_server_refuses_a_public_bind_before_it_loads(model: Path) -> None:
    running = start(model, host="0.0.0.0", key="", ready=False)
    assert running.wait() == 2
    assert "no API key" in running.log() and "--insecure-no-auth" in running.log()


def test_loopback_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"))


def test_default_deny_all_routes(running: Running) -> None:
    """Every route of the document and every other path, by every method, with no key and with wrong ones."""
    with running.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) == 11
    wrong = [{}, {"Authorization": "Bearer x"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
             {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer"}, {"X-Api-Key": KEY}]  # fmt: skip
    closed = [*(path for path in paths if path not in OPEN), "/openapi.json", "/docs", "/redoc", "/nope", "/health/",
              "/%2e%2e/health", "/READY", "/statics", "/v1/models/fox"]  # fmt: skip
    with httpx.Client(base_url=running.url, trust_env=False) as client:
        for path in closed:
            for method in ("GET", "POST", "DELETE", "OPTIONS", "PUT"):
                answer = client.request(method, path, headers=wrong[hash((path, method)) % len(wrong)])
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for headers in wrong:
            assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert status_of(talk(running, b"GET //health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == 401
        twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
        assert client.get("/v1/models", headers=twice).status_code == 401


def test_answers_keep_browsers_from_mischief(running: Running) -> None:
    with running.client() as client:
        origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        for answer in (client.get("/health"), client.get("/nope"), client.options("/v1/models", headers=origin),
                       httpx.get(running.url + "/stats"), client.post("/tokenize", content=b"{")):  # fmt: skip
            assert answer.headers["content-security-policy"].startswith("default-src 'self'")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert not any(name.startswith("access-control") for name in answer.headers)
            assert "server" not in answer.headers
        text = client.post("/v1/completions", content='{"prompt": "x"}', headers={"content-type": "text/plain"})
        assert text.status_code == 415


def test_key_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length are compared, by the function that takes as long for any."""
    seen: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return hmac.compare_digest(a, b)

    class Counted:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(safety, "hmac", Counted)
    key = Key(KEY)
    assert key.fits(KEY.encode()) and not key.fits(b"") and not key.fits(b"x" * 10**6) and not key.fits(b"\xff")
    assert [len(part) for pair in seen for part in pair] == [32] * 8
    assert seen[0][0] == hashlib.sha256(KEY.encode()).digest()
    assert KEY not in repr(key) + str(vars(key))


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\nsecond line\n")
    for key in (read_key(file, {}), read_key(None, {safety.KEY_VARIABLE: KEY})):
        assert key is not None and key.fits(KEY.encode())
    assert read_key(None, {}) is None
    for bad in ("short", "x" * 2000, "with a space in it ....", "schlüssel-schlüssel-ü", "ctrl\x07" * 8, ""):
        file.write_text(bad)
        with pytest.raises(ConfigError) as caught:
            read_key(file, {})
        assert not bad or bad not in str(caught.value)


def test_no_secret_in_any_response_or_log(running: Running) -> None:
    with running.client() as client:
        paths = ["/health", "/stats", "/metrics", "/openapi.json", "/v1/models", "/version", "/nope", f"/{KEY}"]
        texts = [client.get(path).text + str(client.get(path).headers) for path in paths]
        texts.append(client.post("/v1/completions", json={"prompt": KEY[:3], "max_tokens": KEY}).text)
    assert not any(KEY in text for text in texts)
    assert KEY not in running.log()
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert children and not any(KEY in child.environ().values() for child in children)


# ---- what the protocol bears


def test_slow_header_408(running: Running) -> None:
    began = time.monotonic()
    assert status_of(talk(running, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")) == 408
    assert status_of(talk(running, b"")) == 408
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(1 << 16)
        try:  # a drop now and then does not help, on a connection that has been used either
            for _ in range(100):
                connection.sendall(b"G")
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() - began >= 1
    check_alive(running)


def test_slow_body_408(running: Running) -> None:
    assert status_of(talk(running, request(b'{"prompt"', more=b"Content-Length: 100\r\n"))) == 408
    assert status_of(talk(running, request(b'4\r\n{"pr\r\n', more=b"Transfer-Encoding: chunked\r\n"))) == 408
    # refused at once without its body, the connection is not kept for ever either
    unauthorized = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    answer = talk(running, unauthorized)
    assert status_of(answer) == 401 and answer.count(b"HTTP/1.1") == 1
    check_alive(running)


def test_idle_connections_are_closed(running: Running) -> None:
    answer = talk(running, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status_of(answer) == 200 and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("size", [60_000, 66_000, 200_000, 3_000_000])
@pytest.mark.parametrize("where", ["one", "many", "target"])
def test_header_64k_431(running: Running, size: int, where: str) -> None:
    one = b"X-Big: " + b"a" * size + b"\r\n"
    many = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 100) for i in range(size // 106))
    target = b"/health" + (b"?" + b"a" * size if where == "target" else b"")
    headers = {"one": one, "many": many, "target": b""}[where]
    data = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        try:
            connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            assert size > 1_000_000  # it has hung up while we were still talking
            return
        answer = read_all(connection)
    assert status_of(answer) == (200 if size == 60_000 else 431)


@pytest.mark.parametrize("chunked", [False, True])
def test_body_limit_413(running: Running, chunked: bool) -> None:
    body = json.dumps({"prompt": "the fox", "max_tokens": 1, "pad": "x" * (3 << 20)}).encode()
    headers = {**running.headers, "content-type": "application/json"}
    content: Any = (body[at : at + 65536] for at in range(0, len(body), 65536)) if chunked else body
    answer = httpx.post(f"{running.url}/v1/completions", content=content, headers=headers, trust_env=False)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    announced = talk(running, request(b"", more=b"Content-Length: 99999999999\r\n"))
    assert status_of(announced) == 413
    fits = json.dumps({"prompt": "the fox", "max_tokens": 1, "pad": "x" * ((2 << 20) - 100)}).encode()
    assert httpx.post(f"{running.url}/v1/completions", content=fits, headers=headers).status_code == 200


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"x":'])
@pytest.mark.parametrize("depth", [300, 100_000])
def test_deep_json_400(running: Running, opening: bytes, depth: int) -> None:
    for body in (opening * depth, b'{"prompt": "x", "extra": ' + opening * depth):
        assert status_of(talk(running, request(body))) == 400
    whole = b'{"prompt": "x", "max_tokens": 1, "extra": ' + b"[" * depth + b"]" * depth + b"}"
    assert status_of(talk(running, request(whole))) == 400
    check_alive(running)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\xff"}', b'{"prompt": "\xc3"}', b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\x00b"}',
        b"", b"\x00", b"null", b"[]", b'"x"', b"{", b'{"prompt": NaN}', b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "n": 1e400}', b'{"prompt": "x"} x', b"\xef\xbb\xbf{}", b"{'prompt': 'x'}",
    ],
)  # fmt: skip
def test_invalid_utf8_400(running: Running, body: bytes) -> None:
    answer = talk(running, request(body))
    assert status_of(answer) == 400
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("item", [-1, [], [-1], "", 0.5, None, {}])
def test_many_wrong_tokens_are_few_complaints(item: Any) -> None:
    """A complaint for each of a million tokens would take seconds, in which nobody else is answered."""
    for request, body in (
        (CompletionRequest, {"prompt": [item] * 5000}),
        (CompletionRequest, {"prompt": [[item] * 5000]}),
        (DetokenizeRequest, {"tokens": [item] * 5000}),
    ):
        with pytest.raises(ValidationError) as caught:
            request.model_validate_json(json.dumps(body))
        assert caught.value.error_count() < 20


def test_text_that_is_unusual_is_text(running: Running) -> None:
    with running.client() as client:
        for text in ("a\x00b", "\x1b[31m", "\u202e", "\ufffe", "😀", "\\", "\r\n", "<|endoftext|>"):
            answer = client.post("/v1/completions", json={"prompt": text, "max_tokens": 2, "echo": True})
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"].startswith(text)


def test_port_garbage(running: Running) -> None:
    noise = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, b"\x00" * 100,
        b"SSH-2.0-OpenSSH\r\n", b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x80\x04\x95" + b"cos\nsystem\n(S'x'\ntR.",
        b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"\n" * 1000,
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT example.org:80 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\nConnection: close\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    ]  # fmt: skip
    for data in noise:
        answer = talk(running, data)
        assert answer == b"" or status_of(answer) in (200, 400, 401, 404, 405, 408), (data, answer)
    check_alive(running)
    assert "Traceback" not in running.log()


def test_pipelined_requests_are_answered_in_order(running: Running) -> None:
    first = request(json.dumps({"prompt": "the fox", "max_tokens": 3}).encode(), close=False)
    second = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = talk(running, first + first + second)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"] * 3
    assert answer.count(b"text_completion") == 2 and answer.endswith(b'"total":0}')


def test_connections_are_limited(running: Running) -> None:
    deadline = time.monotonic() + 20
    idle: list[socket.socket] = []
    try:
        statuses = []
        while 503 not in statuses and time.monotonic() < deadline:
            idle.append(socket.create_connection(("127.0.0.1", running.port), timeout=20))
            if len(idle) > 40:
                statuses.append(status_of(read_all(idle[-1])))
        assert 503 in statuses
    finally:
        for connection in idle:
            connection.close()
    while True:
        try:
            check_alive(running)
            return
        except (AssertionError, httpx.HTTPError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


# ---- what else a client could reach


def ended(client: httpx.Client, reason: str) -> float:
    """Completions that ended so, as the metrics count them."""
    pattern = rf'^skymoe_request_success_total\{{finished_reason="{reason}",.*\}} (.+)$'
    return sum(map(float, re.findall(pattern, client.get("/metrics").text, re.MULTILINE)))


def test_request_error_isolated(running: Running) -> None:
    """The engine fails at token 77; everybody else goes on."""
    with running.client() as client:
        engine = engine_of(running).pid
        before = {reason: ended(client, reason) for reason in ("error", "abort")}
        with client.stream(
            "POST", "/v1/completions", json={"prompt": [5, 6], "max_tokens": 1500, "stream": True, "ignore_eos": True}
        ) as other:
            lines = other.iter_lines()
            next(lines)
            bad = client.post("/v1/completions", json={"prompt": [77], "max_tokens": 5})
            assert bad.status_code == 500 and bad.json()["error"]["message"] == "not a number"
            streamed = client.post("/v1/completions", json={"prompt": [77], "max_tokens": 5, "stream": True})
            assert streamed.status_code == 500
            assert [ended(client, reason) - before[reason] for reason in before] == [2, 0]
            assert list(lines)[-2] == "data: [DONE]"
        mixed = client.post("/v1/completions", json={"prompt": [[5], [77]], "max_tokens": 500, "stream": True})
        assert '"error":{"message":"not a number"' in mixed.text or mixed.status_code == 500
        stats = client.get("/stats").json()
    assert stats["num_running"] == stats["num_waiting"] == 0 and stats["kv_cache_usage"] == 0
    assert engine_of(running).pid == engine
    check_alive(running)


@pytest.mark.parametrize("path", ["/static/../config.py", "/static/..%2fconfig.py",
                                  "/static/%2e%2e/%2e%2e/app.py",
                                  "/static/....//x", "/static//etc/passwd", "/static/%00", "/static/",
                                  "/../../x"])  # fmt: skip
def test_no_path_is_ever_joined(running: Running, path: str) -> None:
    data = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n".encode()
    answer = talk(running, data)
    assert status_of(answer) == 404 and b"import" not in answer


def test_bind_loopback_only(running: Running) -> None:
    """One socket of the whole process tree listens, and it is ours on 127.0.0.1."""
    tree = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    listening = [
        connection.laddr
        for process in tree
        for connection in process.net_connections()
        if connection.status == "LISTEN"
    ]
    assert listening == [("127.0.0.1", running.port)]


def test_no_outbound_network(model: Path) -> None:
    """The server's process may not even look a name up, and answers all the same."""
    guard = """if True:
        import sys
        def refuse(event, args):
            if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
                if args and args[0] not in ("127.0.0.1",) and event != "socket.connect":
                    raise RuntimeError(f"{event} {args}")
                if event == "socket.connect":
                    raise RuntimeError(f"{event} {args}")
        sys.addaudithook(refuse)
    """
    folder = model.parent / "guard"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text("\n".join(line[4:] for line in guard.splitlines()[1:]))
    root = Path(__file__).parents[2]
    with server(model, env={"PYTHONPATH": f"{folder}:{root}"}) as running:
        with running.client() as client:
            image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
            body = {"messages": [{"role": "user", "content": [image]}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 400
        check_alive(running)
        assert "RuntimeError" not in running.log()


def test_no_module_of_the_server_loads_torch() -> None:
    code = "import skymoe.serve.run, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
