"""Load on an OpenAI-compatible server, and what its clients feel. No model, no torch; benchmarks/serve.py uses it.

Two ways to ask. Closed loop: N clients, each asks again when its answer is complete; this finds the throughput, and
hides waiting, as nobody arrives while all wait. Poisson: requests arrive at a rate whether or not the server keeps up;
their times count from the moment they were due, so that a slow server cannot slow its own test down ("coordinated
omission"). Lengths and arrivals come from a seed: every server gets the same questions at the same times.

Failures are counted and named, never left out: a request that was refused or cut off is no answer, adds no tokens and
misses the objective of `goodput`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

import h11

_PATIENCE_S = 600.0
_WORDS = 4000


@dataclass(frozen=True)
class Question:
    """One request: its text, how many tokens it wants, and when it is due (seconds; 0 in a closed loop)."""

    prompt: str
    num_tokens: int
    due: float = 0.0


@dataclass
class Answer:
    """What came of it. Times are of one clock; `pieces` are those at which text came."""

    wanted: int
    start: float
    end: float = 0.0
    pieces: list[float] = field(default_factory=list)
    num_tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""

    @property
    def first_s(self) -> float:
        """From the moment it was due to the first piece of text."""
        return self.pieces[0] - self.start

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first; 0 when there is none."""
        return (self.pieces[-1] - self.pieces[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


@dataclass(frozen=True)
class Objective:
    """What a request must meet to count as good: time to first token, and mean time per token after it."""

    first_s: float
    per_token_s: float

    def met_by(self, answer: Answer) -> bool:
        """Whether a client would be content."""
        return not answer.error and answer.first_s <= self.first_s and answer.per_token_s <= self.per_token_s


def draw_lengths(mean: int, count: int, *, mixed: bool, seed: int) -> list[int]:
    """Lengths of mean `mean`: all the same, or evenly spread from a quarter of it to seven quarters."""
    if not mixed:
        return [mean] * count
    least = max(1, mean // 4)
    generator = random.Random(seed)
    return [generator.randint(least, 2 * mean - least) for _ in range(count)]


def poisson_times(rate: float, count: int, *, seed: int) -> list[float]:
    """When `count` requests arrive, `rate` per second: exponential gaps, the first at the first gap."""
    generator, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += generator.expovariate(rate)
        times.append(now)
    return times


def words(seed: int) -> list[str]:
    """Invented words of two to four syllables."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(generator.choices(syllables, k=generator.randint(2, 4))) for _ in range(_WORDS)]


def make_text(length: int, *, seed: int, count: Callable[[str], int]) -> str:
    """A text of at least `length` tokens, and hardly more, that begins like no other; `count` counts tokens."""
    generator, known = random.Random(seed), words(0)
    said = generator.choices(known, k=max(1, length // 8))
    while (missing := length - count(" ".join(said))) > 0:
        said += generator.choices(known, k=max(1, missing // 8))
    return " ".join(said)


async def ask(url: str, question: Question, body: dict[str, object], start: float) -> Answer:
    """Ask, and note when each piece of text comes. Never raises but for a cancellation."""
    answer = Answer(question.num_tokens, start)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    sent = {"prompt": question.prompt, "max_tokens": question.num_tokens, **stream, **body}
    try:
        async with asyncio.timeout(_PATIENCE_S):
            async for event in _events(url, json.dumps(sent).encode()):
                _note(answer, event)
        if not answer.pieces and not answer.error:
            answer.error = "no text came"
    except (OSError, EOFError, TimeoutError, ValueError, h11.ProtocolError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:200]
    answer.end = time.perf_counter()
    return answer


def _note(answer: Answer, event: dict[str, object]) -> None:
    if "error" in event:
        answer.error = json.dumps(event["error"])[:200]
    choices = event.get("choices")
    if isinstance(choices, list) and choices and choices[0].get("text"):
        answer.pieces.append(time.perf_counter())
        answer.num_tokens += 1
    if isinstance(usage := event.get("usage"), dict):  # the server's own count: a piece may be several tokens, or none
        answer.num_tokens = usage["completion_tokens"]
        answer.prompt_tokens = usage["prompt_tokens"]


async def _events(url: str, body: bytes) -> AsyncIterator[dict[str, object]]:
    """The server-sent events of one POST to /v1/completions; raises EOFError when `[DONE]` never comes."""
    rest, done = b"", False
    async for data in _post(url, body):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            text = line.removeprefix(b"data:").strip()
            done = done or text == b"[DONE]"
            if line.startswith(b"data:") and text != b"[DONE]":
                yield json.loads(text)
    if not done:
        raise EOFError("the stream was cut off")


async def _post(url: str, body: bytes) -> AsyncIterator[bytes]:
    """The body of the answer as it comes; raises ValueError on any status but 200. h11 costs less than a client."""
    parts = urlsplit(url)
    headers = [("Host", parts.netloc), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    wire = h11.Connection(h11.CLIENT)
    try:
        head = h11.Request(method="POST", target="/v1/completions", headers=[*headers, ("Connection", "close")])
        writer.write((wire.send(head) or b"") + (wire.send(h11.Data(data=body)) or b""))
        wire.send(h11.EndOfMessage())
        await writer.drain()
        while not isinstance(event := wire.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
            if event is h11.NEED_DATA:
                wire.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise ValueError(f"HTTP {event.status_code}")
            elif isinstance(event, h11.Data):
                yield bytes(event.data)
    finally:
        writer.close()


async def closed_loop(url: str, questions: Sequence[Question], body: dict[str, object], clients: int) -> list[Answer]:
    """`clients` at a time, each with the next question as soon as it has its answer."""
    waiting, answers = iter(questions), []

    async def client() -> None:
        for question in waiting:
            answers.append(await ask(url, question, body, time.perf_counter()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(url: str, questions: Sequence[Question], body: dict[str, object]) -> list[Answer]:
    """Every question when it is due, whatever became of the others."""
    begin = time.perf_counter()

    async def client(question: Question) -> Answer:
        await asyncio.sleep(max(0.0, begin + question.due - time.perf_counter()))
        return await ask(url, question, body, begin + question.due)

    return list(await asyncio.gather(*map(client, questions)))


def percentile(values: Sequence[float], percent: float) -> float:
    """As numpy.percentile: linear between the neighbours; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(answers: Sequence[Answer], objective: Objective) -> dict[str, object]:
    """What clients felt. Latencies are of complete answers; rates are over the time from first due to last end."""
    good = [answer for answer in answers if not answer.error]
    seconds = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    gaps = [later - sooner for answer in good for sooner, later in pairwise(answer.pieces)]
    times = {
        "first_token_s": [answer.first_s for answer in good],
        "between_pieces_s": gaps,
        "per_token_s": [answer.per_token_s for answer in good if answer.num_tokens > 1],
        "end_to_end_s": [answer.end - answer.start for answer in good],
    }
    return {
        "asked": len(answers),
        "failed": len(answers) - len(good),
        "errors": dict(Counter(answer.error for answer in answers if answer.error).most_common(5)),
        "shorter_than_wanted": sum(answer.num_tokens < answer.wanted for answer in good),
        "seconds": seconds,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "output_tokens": sum(answer.num_tokens for answer in good),
        "output_tokens_per_s": sum(answer.num_tokens for answer in good) / seconds,
        "goodput_requests_per_s": sum(map(objective.met_by, answers)) / seconds,
        "good_fraction": sum(map(objective.met_by, answers)) / len(answers),
        **{key: {f"p{percent}": percentile(each, percent) for percent in (50, 90, 99)} for key, each in times.items()},
    }
