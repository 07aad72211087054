"""How much may be under way at once. Places are taken when a request arrives, before anything is awaited.

vLLM checked the length of its queue on arrival and counted a request only after its prompt was read, so that a burst
passed the check as a whole. Here a request takes its places, one per completion, and its tokens, as many as it could
have (no more than bytes of text, nor than the context), in one step that nothing can come between; what it turns out
not to need it gives back. Who finds no place is told to come again (429), and who asks while the model loads or the
server drains likewise (503).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from skymoe.serve.errors import ApiError

_RETRY = {"retry-after": "1"}


@dataclass
class Reservation:
    """Places and tokens of one request."""

    requests: int
    tokens: int


class Admission:
    """The places.

    Args:
        max_requests: completions under way.
        max_tokens: prompt tokens of all of them.

    Attributes:
        requests, tokens: that are taken.
        draining: whether nobody is let in any more.
        refused: how many were not let in, by reason.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.requests = 0
        self.tokens = 0
        self.draining = False
        self.refused = {"queue_full": 0, "tokens_full": 0, "bodies_full": 0, "draining": 0, "loading": 0}
        self._empty = asyncio.Event()
        self._max_requests = max_requests
        self._max_tokens = max_tokens

    def check_open(self, *, loading: bool) -> None:
        """Raises ApiError 503 while the model loads or the server drains."""
        if self.draining:
            raise self._refuse(503, "draining", "the server is shutting down", {"retry-after": "30"})
        if loading:
            raise self._refuse(503, "loading", "the model is being loaded", {"retry-after": "5"})

    def check_room(self) -> None:
        """Raises ApiError 429 when there is not one place: known before a body is read, as `reserve` knows it after."""
        if self.requests >= self._max_requests:
            raise self._refuse(429, "queue_full", "the queue is full; try again", _RETRY)

    @contextmanager
    def reserve(self, requests: int, tokens: int) -> Iterator[Reservation]:
        """Take `requests` places and room for `tokens` until the end of the block; raises ApiError 429.

        A request of more tokens than there is room for at all is let in when nobody else is under way.
        """
        if self.requests + requests > self._max_requests:
            raise self._refuse(429, "queue_full", "the queue is full; try again", _RETRY)
        if self.requests and self.tokens + tokens > self._max_tokens:
            raise self._refuse(429, "tokens_full", "the prompts under way are too long; try again", _RETRY)
        place = Reservation(requests, tokens)
        self.requests += requests
        self.tokens += tokens
        try:
            yield place
        finally:
            self.requests -= place.requests
            self.tokens -= place.tokens
            if not self.requests:
                self._empty.set()

    async def empty(self) -> None:
        """Wait until nothing is under way."""
        while self.requests:
            self._empty.clear()
            await self._empty.wait()

    def settle(self, place: Reservation, tokens: int) -> None:
        """`place` needs only so many tokens."""
        self.tokens -= place.tokens - tokens
        place.tokens = tokens

    def count_refusal(self, reason: str) -> None:
        """Somebody was sent away elsewhere."""
        self.refused[reason] += 1

    def _refuse(self, status: int, reason: str, message: str, headers: dict[str, str]) -> ApiError:
        self.refused[reason] += 1
        return ApiError(status, message, code=reason, headers=headers)
