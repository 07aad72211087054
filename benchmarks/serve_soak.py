"""A server under load for a while: does its memory stay flat, and is every page free in the end?

    python benchmarks/serve_soak.py [--minutes 20] [--clients 4] [--model DIR] [--tp 1]

Clients ask without a pause for a mix of what a server sees: prompts of any length, some that begin alike, streams, a
third of which are dropped in the middle, several answers, log-probabilities, requests that are refused. Resident memory
of the server and of all its processes is read every ten seconds. The slope is that of a line through the second half of
the readings (least squares): what is filled once, caches among it, is in the first half. Keys and values get little
room (`--kv-memory`), or else their pages, taken from the machine when they are first written, would go on filling.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from serve_peers import make_model, skymoe_server

_EVERY_S = 10.0


def question(draw: random.Random, vocab_size: int) -> dict[str, Any]:
    """A request; one in twenty is a bad one."""
    shared = list(range(5, 5 + draw.choice((0, 0, 40))))
    prompt = shared + [draw.randrange(3, vocab_size) for _ in range(draw.randint(1, 120))]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randint(1, 40), "temperature": draw.choice((0, 0.8))}
    body |= {"stream": draw.random() < 0.5, "n": draw.choice((1, 1, 1, 3)), "logprobs": draw.choice((None, None, 5))}
    if draw.random() < 0.05:
        body["prompt"] = [vocab_size + 5]
    return body


async def client(http: httpx.AsyncClient, seed: int, vocab_size: int, until: float, counts: dict[str, int]) -> None:
    """Ask until the time is over."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        body = question(draw, vocab_size)
        drop = body["stream"] and draw.random() < 1 / 3
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            name = "dropped" if drop and answer.status_code == 200 else str(answer.status_code)
            counts[name] = counts.get(name, 0) + 1
            async for _ in answer.aiter_raw():
                if drop:
                    break


async def soak(url: str, pids: list[int], minutes: float, clients: int) -> dict[str, Any]:
    """Load the server, and read its memory."""
    until, counts, readings = time.monotonic() + 60 * minutes, {}, []
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        before = (await http.get("/stats")).json()
        work = [asyncio.create_task(client(http, i, before["vocab_size"], until, counts)) for i in range(clients)]
        begin = time.monotonic()
        while not all(task.done() for task in work):
            await asyncio.sleep(_EVERY_S)
            readings.append((time.monotonic() - begin, sum(psutil.Process(pid).memory_info().rss for pid in pids)))
            print(f"{readings[-1][0]:7.0f} s  {readings[-1][1] / 2**20:8.1f} MiB  {counts}", flush=True)
        await asyncio.gather(*work)
        await asyncio.sleep(2)
        after = (await http.get("/stats")).json()
    seconds, sizes = np.array(readings).T
    late = seconds >= seconds[-1] / 2
    slope = float(np.polyfit(seconds[late], sizes[late], 1)[0]) * 3600 / 2**20
    return {
        "minutes": minutes, "clients": clients, "answers": counts, "generation_tokens": after["generation_tokens"],
        "first_mib": sizes[0] / 2**20, "middle_mib": sizes[late][0] / 2**20, "last_mib": sizes[-1] / 2**20,
        "slope_mib_per_hour": slope, "kv_cache_usage_in_the_end": after["kv_cache_usage"],
        "running_in_the_end": after["num_running"], "readings": readings,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--model", type=Path, help="default: a tiny random one")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--kv-memory", default="0.02", help="GB per rank")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serve_soak.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or make_model(Path(directory) / "model", "tiny", "bfloat16")
        with skymoe_server(model, ["--tp", str(options.tp), "--kv-memory", options.kv_memory]) as url:
            (server,) = (p for p in psutil.Process().children() if "serve" in p.cmdline())
            pids = [server.pid, *(child.pid for child in server.children(recursive=True))]
            found = asyncio.run(soak(url, pids, options.minutes, options.clients))
    print(json.dumps({name: value for name, value in found.items() if name != "readings"}, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
