"""The life of a server: loading, load, clients that go away, an engine that dies, signals."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serve.servers import KEY, Running, engine_of, make_model, server, start

from skymoe.serve.protocol.chat import ChatMessage
from skymoe.serve.texts import Texts

LONG = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "fox")


@pytest.fixture(scope="module")
def slow(model: Path) -> Iterator[Running]:
    """Its engine takes 20 ms for a step, and has room for 64 at once; 8 may wait."""
    with server(model, engine={"step_s": 0.02}, limits={"waiting": 8}) as running:
        yield running


def wait_for(found: Any, *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def check_empty(running: Running) -> None:
    """Every page is free again, and nobody is in the engine or before it."""

    def empty() -> bool:
        stats = running.stats()
        return stats["num_running"] == stats["num_waiting"] == 0 and stats["kv_cache_usage"] == 0

    wait_for(empty)
    with running.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 2})
    assert answer.status_code == 200


def raw(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=60)


# ---- clients that go away


@pytest.mark.parametrize("stream", [False, True])
def test_nonstream_disconnect_cancels(slow: Running, stream: bool) -> None:
    """2000 tokens take 40 s; the client stays until they are being written."""
    written = slow.stats()["generation_tokens"]
    with connect(slow) as connection:
        connection.sendall(raw({**LONG, "stream": stream, "n": 4}))
        wait_for(lambda: slow.stats()["generation_tokens"] > written + 4)
    check_empty(slow)
    assert slow.stats()["generation_tokens"] < written + 4000


def drop(running: Running, seed: int, longest_s: float) -> None:
    chance = random.Random(seed)
    with connect(running) as connection:
        data = raw(
            {**LONG, "stream": chance.random() < 0.5, "n": chance.choice([1, 1, 2, 8]), "prompt": [seed % 250 + 1] * 40}
        )
        cut = chance.random() < 0.2
        connection.sendall(data[: chance.randrange(len(data))] if cut else data)
        time.sleep(chance.random() * longest_s)
        if chance.random() < 0.5:  # a reset instead of a good-bye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def test_disconnect_frees_kv(slow: Running) -> None:
    """200 clients drop at random moments, some within their request; every page comes back."""
    engine = engine_of(slow).pid
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda seed: drop(slow, seed, 0.3), range(200)))
    check_empty(slow)
    assert engine_of(slow).pid == engine
    assert "Traceback" not in slow.log()


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off(model: Path) -> None:
    body = {"prompt": "漢" * 200, "max_tokens": 200_000, "stream": True, "logprobs": 20, "n": 8, "ignore_eos": True}
    engine = {"context": 1 << 20, "pages": 1 << 18}
    with server(model, engine=engine, limits={"write_s": 1.0}) as running, connect(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(raw(body))
        wait_for(lambda: running.stats()["generation_tokens"] > 0)
        check_empty(running)


# ---- too many at once


def test_queue_bound_atomic(slow: Running) -> None:
    """72 places (64 in the batch, 8 waiting): of 200 that come in one burst exactly 72 are let in."""

    async def ask(client: httpx.AsyncClient) -> int:
        body = {"prompt": [9, 8, 7], "max_tokens": 150, "ignore_eos": True}
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        return answer.status_code

    async def burst() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=slow.url, headers=slow.headers, timeout=120, trust_env=False, limits=limits
        ) as client:
            return await asyncio.gather(*(ask(client) for _ in range(200)))

    def refusals() -> float:
        with slow.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if 'refused_total{reason="queue_full"}' in line)

    before = refusals()
    statuses = asyncio.run(burst())
    assert statuses.count(200) >= 72 and statuses.count(200) + statuses.count(429) == 200
    assert refusals() - before == statuses.count(429) > 0
    check_empty(slow)
    with slow.client() as client:
        many = client.post("/v1/completions", json={"prompt": ["x"] * 128, "n": 2})
        full = client.post("/v1/completions", json={"prompt": ["x"] * 73, "max_tokens": 1})
    assert many.status_code == 400 and full.status_code == 429


def test_who_is_let_in_finds_room_in_the_engine(model: Path) -> None:
    """The engine bounds its own queue too; it has room for as many as the server lets in."""
    body = {"prompt": ["x"] * 100, "max_tokens": 1}
    with server(model, limits={"waiting": 1300}, engine={"step_s": 0.3}) as running, running.client() as client:
        with ThreadPoolExecutor(13) as pool:
            asked = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(13)]
        assert {each.result().status_code for each in asked} == {200}


def test_prompts_under_way_are_bounded_in_tokens(model: Path) -> None:
    with server(model, engine={"step_s": 0.02}, limits={"tokens": 3000}) as running:
        with connect(running) as connection, running.client() as client:
            connection.sendall(raw({"prompt": [5] * 1000, "max_tokens": 1000, "n": 2, "ignore_eos": True}))
            wait_for(lambda: running.stats()["num_running"] == 2)
            full = client.post("/v1/completions", json={"prompt": [5] * 1500, "max_tokens": 1})
            assert full.status_code == 429 and full.json()["error"]["code"] == "tokens_full"
            assert client.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 1}).status_code == 200
        check_empty(running)


@pytest.mark.parametrize("what", ["text", "chat", "names"])
def test_tokenizer_on_thread(model: Path, what: str) -> None:
    """While a megabyte is tokenized the event loop turns: on the loop it would turn once."""

    async def turns() -> tuple[int, int, float]:
        texts = Texts(model, template_s=2)
        text = " ".join(f"the fox {i} äöü漢" for i in range(1 << 16))[: 1 << 20]
        asked = {
            "text": lambda: texts.tokenize(text, special=True),
            "chat": lambda: texts.chat([ChatMessage(role="user", content=text)]),
            "names": lambda: texts.names([9] * (1 << 19)),
        }
        work = asyncio.create_task(asked[what]())
        count, longest = 0, 0.0
        while not work.done():
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - began - 0.005)
            count += 1
        texts.close()
        return count, len(work.result()), longest

    count, tokens, longest = asyncio.run(turns())
    print(f"{tokens} tokens, {count} turns of the loop meanwhile, the longest late by {longest * 1000:.1f} ms")
    assert tokens > 1 << 18 and count > 10


def test_one_megabyte_prompts_keep_nobody_waiting(slow: Running) -> None:
    """Long texts wait for one another, short ones do not wait for them: they are answered while three are read."""
    text = " ".join(f"the fox {i} äöü漢" for i in range(1 << 16))[: 1 << 20]
    order: list[str] = []

    def long() -> None:
        with slow.client() as client:
            answer = client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
            order.append("long")
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"

    with ThreadPoolExecutor(3) as pool, slow.client() as client:
        asked = [pool.submit(long) for _ in range(3)]
        assert client.post("/v1/completions", json={"prompt": "the fox", "max_tokens": 1}).status_code == 200
        order.append("short")
        for each in asked:
            each.result()
    assert order.index("short") < 3
    check_empty(slow)


# ---- loading, the engine's end


def test_while_it_loads_it_lives_and_refuses(model: Path) -> None:
    running = start(model, engine={"load_s": 3}, ready=False, port=(port := free_port()))
    running.url = f"http://127.0.0.1:{port}"
    with running.client() as client:
        wait_for(lambda: answers(client))
        assert client.get("/health").json()["status"] == "loading"
        assert client.get("/ready").status_code == 503
        asked = client.post("/v1/completions", json={"prompt": "x"})
        assert asked.status_code == 503 and int(asked.headers["retry-after"]) >= 1
        assert asked.json()["error"]["code"] == "loading"
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert running.process.stdout is not None and running.process.stdout.readline() == f"ready {running.url}\n"
    assert running.end() == 0


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_model_that_cannot_be_loaded_ends_the_server(model: Path) -> None:
    running = start(model, engine={"fail_load": "these weights are broken"}, ready=False)
    assert running.wait() == 2
    assert "error: these weights are broken" in running.log()


def test_a_port_that_is_taken_is_said(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = start(model, port=taken.getsockname()[1], ready=False)
        assert running.wait() == 3
    assert "cannot listen on 127.0.0.1" in running.log()


@pytest.mark.parametrize("how", ["kill", pytest.param("defect", marks=pytest.mark.slow)])
def test_kill9_worker_clean_exit(model: Path, how: str) -> None:
    """The server says which process ended and how, tells its clients, and ends with 3."""
    with server(model, engine={"step_s": 0.02, "die": 99}) as running:
        engine = engine_of(running)
        with (
            running.client() as client,
            client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            if how == "kill":
                engine.kill()
            else:
                with connect(running) as connection:
                    connection.sendall(raw({"prompt": [99]}))
                    assert b"503" in connection.recv(1 << 16)
            rest = [line for line in lines if line]
        assert '"code":"engine_died"' in rest[-2] and rest[-1] == "data: [DONE]"
        assert running.wait() == 3
        assert f"the engine (process {engine.pid}) has ended" in running.log()
        assert ("SIGKILL" if how == "kill" else "SIGABRT") in running.log()
        assert not psutil.pid_exists(engine.pid)


def test_no_process_outlives_a_killed_server(model: Path) -> None:
    with server(model) as running:
        tree = psutil.Process(running.process.pid).children(recursive=True)
        assert tree
        running.process.kill()
        running.process.wait()
        _, alive = psutil.wait_procs(tree, timeout=20)
        assert not alive


# ---- signals


def test_sigterm_drain(model: Path) -> None:
    """Who is in is served to the end, who comes is told 503, then exit code 0."""
    with server(model, engine={"step_s": 0.01}) as running, running.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 200, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/ready").status_code == 503)
            assert client.get("/health").json()["status"] == "draining"
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) == 200
        assert running.wait() == 0
        assert "Traceback" not in running.log()


def test_a_drain_that_takes_too_long_is_cut_short(model: Path) -> None:
    with server(model, engine={"step_s": 0.05}, drain_s=0.5) as running, running.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"code":"aborted"' in rest[-2] and rest[-1] == "data: [DONE]"
        assert running.wait() == 0 and "1 requests did not end" in running.log()


@pytest.mark.parametrize("first", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_second_sigterm_aborts(model: Path, first: signal.Signals) -> None:
    with server(model, engine={"step_s": 0.1}) as running:
        with connect(running) as connection:
            connection.sendall(raw({**LONG, "stream": True}))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            os.kill(running.process.pid, first)
            with running.client() as client:
                wait_for(lambda: client.get("/ready").status_code == 503)
            os.kill(running.process.pid, signal.SIGTERM)
            assert running.wait() == 130
        assert "Traceback" not in running.log()


# ---- many


@pytest.mark.slow
def test_flood_1000_conns_429_and_recover(model: Path) -> None:
    """1000 connections ask at once and again for ten seconds; /health answers all the while, then all is as before."""
    flood = Path(__file__).with_name("flood.py")
    with server(model, engine={"step_s": 0.02}, limits={"waiting": 64}) as running, running.client() as client:
        command = [sys.executable, str(flood), str(running.port), KEY, "1000", "10"]
        waits = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flooding:
            while flooding.poll() is None:
                began = time.perf_counter()
                assert client.get("/health").status_code == 200
                waits.append(time.perf_counter() - began)
                time.sleep(0.01)
            assert flooding.stdout is not None
            seen = json.loads(flooding.stdout.read())
        p99 = sorted(waits)[int(len(waits) * 0.99)] * 1000
        print(f"{seen}, /health {len(waits)} times, p99 {p99:.1f} ms")
        assert seen.keys() == {"200", "429"} and seen["429"] > 500
        check_empty(running)
        assert running.end() == 0


@pytest.mark.slow
@pytest.mark.nightly
def test_soak_rss_flat(model: Path) -> None:
    """Many small requests of all kinds: the server's memory does not grow with their number."""
    with server(model, engine={"most": 4}) as running, running.client() as client:
        process = psutil.Process(running.process.pid)

        def many(count: int) -> int:
            for i in range(count):
                body = {"prompt": f"the fox {i}", "n": i % 3 + 1, "stream": i % 2 == 0, "logprobs": i % 5}
                assert client.post("/v1/completions", json=body).status_code == 200
                client.post("/v1/completions", content=b"{")
            return process.memory_info().rss

        many(500)
        first, second = many(1500), many(1500)
        assert second - first < 4 << 20
        check_empty(running)
