"""Many connections that ask at once and again, in a process of its own: `python flood.py PORT KEY CONNECTIONS SECONDS`.

Prints how often each status came, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter

_BODY = json.dumps({"prompt": [9, 8, 7], "max_tokens": 100, "ignore_eos": True})


async def ask(port: int, key: str, until: float, seen: Counter[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    data = f"{head}Content-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n{_BODY}".encode()
    while time.monotonic() < until:
        writer.write(data)
        answer = await reader.readuntil(b"\r\n\r\n")
        seen[int(answer.split(b" ", 2)[1])] += 1
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        await asyncio.sleep(1.0 if b" 429 " in answer[:20] else 0)
    writer.close()


async def main(port: int, key: str, connections: int, seconds: float) -> None:
    seen: Counter[int] = Counter()
    until = time.monotonic() + seconds
    await asyncio.gather(*(ask(port, key, until, seen) for _ in range(connections)))
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
