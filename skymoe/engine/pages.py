"""The page table: which page of the key/value cache holds which tokens of whom. No torch.

The cache is an array of pages of `page_size` positions. A request holds a list of pages, page i for its positions
i * page_size .. (i + 1) * page_size - 1; the keys and values are never copied, only the list says whose they are
(PagedAttention: Kwon et al. 2023, section 4).

Equal beginnings are shared. A full page of a prompt is *published* under a key that stands for its tokens and all
tokens before it: SHA-256 over the key of the page before and its own tokens. A request whose prompt begins with known
keys holds those pages too; each page counts its holders. Who could make two beginnings with one key could read the
answers to another's prompt, so the hash is cryptographic; Python's own hash of a tuple of integers is neither secret
nor hard to collide. A page that nobody holds any more stays known until its room is needed: pages without content go
first, then the one that was released longest ago. A request releases its last page first, so that beginnings, which
are of most use, stay longest.

Left out: sharing of pages that are not full (copy on write), other levels of memory than one, and pages per layer: a
model with sliding windows keeps the pages behind its windows too. That somebody sent the same beginning before can be
told from the time to the first token; an operator who minds turns `prefix_cache` off.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def page_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each full page of `tokens`: equal for equal tokens up to its end, and for no others."""
    keys: list[bytes] = []
    key = b""
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        key = hashlib.sha256(key + array("q", tokens[start : start + page_size]).tobytes()).digest()
        keys.append(key)
    return keys


@dataclass(frozen=True)
class Opened:
    """Pages for a request that begins.

    Attributes:
        pages: in the order of its positions.
        num_found: how many of the first of them hold their content already.
    """

    pages: list[int]
    num_found: int


class PageTable:
    """Who holds which page, and what can be shared. Each page is held, or known (free, with content), or empty.

    Args:
        num_pages: of the cache.
        page_size: tokens of a page.
        share: publish pages; without, nothing is ever found.
    """

    def __init__(self, num_pages: int, page_size: int, *, share: bool = True) -> None:
        self.num_pages, self.page_size, self.share = num_pages, page_size, share
        self._holders = [0] * num_pages
        self._empty = list(range(num_pages - 1, -1, -1))
        self._known: dict[int, None] = {}  # free pages with content, the longest released first
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._empty) + len(self._known)

    @property
    def num_cached(self) -> int:
        """Those of them whose content can still be shared."""
        return len(self._known)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-num_tokens // self.page_size)

    def open(self, keys: Sequence[bytes], num_pages: int, *, multiple: int = 1, spare: int = 0) -> Opened | None:
        """Holds `num_pages` pages, the first of them those already known under `keys`; None if too few are free.

        Args:
            keys: of the full pages that may be found, at most `num_pages` of them.
            num_pages: how many in all.
            multiple: pages are found in whole groups of so many.
            spare: pages that must be free afterwards.
        """
        if num_pages - len(keys) + spare > self.num_free:
            return None
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        del found[len(found) // multiple * multiple :]
        if num_pages - len(found) + spare > self.num_free - sum(page in self._known for page in found):
            return None
        for page in found:
            self._known.pop(page, None)
            self._holders[page] += 1
        return Opened(found + [self._take() for _ in range(num_pages - len(found))], len(found))

    def extend(self, pages: list[int]) -> bool:
        """Appends one more page to `pages`; False if none is free."""
        if not self._empty and not self._known:
            return False
        pages.append(self._take())
        return True

    def publish(self, page: int, key: bytes) -> None:
        """From now on `page`, which is held, can be found under `key`; unless another is."""
        if self.share and key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody shall find these pages, which are held, any more: their content is bad."""
        for page in pages:
            self._page_of.pop(self._key_of.pop(page, b""), None)

    def release(self, pages: Sequence[int]) -> None:
        """One holder gives these pages back."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._known[page] = None
                else:
                    self._empty.append(page)

    def _take(self) -> int:
        """A free page, without content, held once."""
        if self._empty:
            page = self._empty.pop()
        else:
            page = next(iter(self._known))
            del self._known[page]
            del self._page_of[self._key_of.pop(page)]
        self._holders[page] = 1
        return page
