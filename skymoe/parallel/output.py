"""What ranks other than 0 say, shown with their rank; the same words from several ranks once."""

from __future__ import annotations

import os
import selectors
import sys
import time
from typing import IO

_QUIET_S = 0.3  # a pause that ends what belongs together
_LONGEST = 1 << 16


class Output:
    """Pipes of ranks. What one says without a pause is a block; a block that another has said already is left out."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._blocks: dict[int, bytes] = {}
        self._spoke: dict[int, float] = {}
        self._shown: set[bytes] = set()

    def add(self, rank: int, pipe: IO[bytes]) -> None:
        """Read from `pipe` too."""
        os.set_blocking(pipe.fileno(), False)
        self._selector.register(pipe, selectors.EVENT_READ, rank)

    def show(self, seconds: float) -> None:
        """Read for up to `seconds` and show what is complete."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self._selector.get_map():
                time.sleep(left)
            elif not self._read(left):
                break
        for rank, spoke in list(self._spoke.items()):
            if time.monotonic() - spoke > _QUIET_S or len(self._blocks[rank]) > _LONGEST:
                self._print(rank)

    def finish(self) -> None:
        """Read what is left in the pipes, show everything and close them."""
        while self._selector.get_map() and self._read(0.0):
            pass
        for rank in list(self._blocks):
            self._print(rank)
        for key in list(self._selector.get_map().values()):
            self._close(key.fileobj)

    def _read(self, seconds: float) -> bool:
        """Read once from whatever is ready; whether anything was."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            data = os.read(key.fd, _LONGEST)
            if data:
                self._blocks[key.data] = self._blocks.get(key.data, b"") + data
                self._spoke[key.data] = time.monotonic()
            else:
                self._close(key.fileobj)
        return bool(ready)

    def _close(self, pipe: object) -> None:
        assert not isinstance(pipe, int)
        self._selector.unregister(pipe)  # type: ignore[arg-type]
        pipe.close()  # type: ignore[attr-defined]

    def _print(self, rank: int) -> None:
        block = self._blocks.pop(rank, b"")
        self._spoke.pop(rank, None)
        if not block or block in self._shown:
            return
        self._shown.add(block)
        for line in block.decode(errors="replace").splitlines():
            sys.stderr.write(f"rank {rank}: {line}\n")
        sys.stderr.flush()
