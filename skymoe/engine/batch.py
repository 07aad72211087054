"""Batch: who runs, who waits, and the pages of those who run. No torch.

Everybody who runs was added before everybody who waits, and both are in that order: requests are let in from the front
of the queue only, and the one stopped for want of pages is the last of those who run and goes to the front.
"""

from __future__ import annotations

from collections import OrderedDict

from skymoe.engine.pages import PageTable, page_keys
from skymoe.engine.progress import Progress


class Batch:
    """Running and waiting requests.

    Args:
        pages: the page table.
        max_running: the most requests that run.

    Attributes:
        running: in the order in which they were added.
        waiting: the same, by id.
        num_preemptions: how often a request was stopped for want of pages.
        prefix_queries, prefix_hits: prompt tokens looked up in the cache, and found; once per request.
    """

    def __init__(self, pages: PageTable, max_running: int) -> None:
        self.pages, self._max_running = pages, max_running
        self.running: list[Progress] = []
        self.waiting: OrderedDict[str, Progress] = OrderedDict()
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0

    def join(self, progress: Progress) -> None:
        """A request joins the end of the queue."""
        self.waiting[progress.request.id] = progress

    def leave(self, progress: Progress) -> None:
        """A request is over, wherever it is."""
        if self.waiting.get(progress.request.id) is progress:
            del self.waiting[progress.request.id]
        else:
            self.running.remove(progress)
            self._give_back(progress)

    def admit(self) -> Progress | None:
        """Lets the first of the queue run, if the pages of all its tokens are free; None if not.

        One more page stays free for each request that runs already, so that they do not stop the new one at once.
        """
        if not self.waiting or len(self.running) >= self._max_running:
            return None
        progress = next(iter(self.waiting.values()))
        if progress.keys is None:
            shareable = progress.prompt[: progress.num_shareable] if self.pages.share else ()
            progress.keys = page_keys(shareable, self.pages.page_size)
        opened = self.pages.open(
            progress.keys[: progress.num_findable // self.pages.page_size],
            self.pages.pages_for(progress.length),
            multiple=progress.chunk // self.pages.page_size,
            spare=len(self.running),
        )
        if opened is None:
            return None
        del self.waiting[progress.request.id]
        self.running.append(progress)
        progress.pages = opened.pages
        progress.computed = opened.num_found * self.pages.page_size
        if progress.num_cached is None:
            progress.num_cached = progress.computed
            self.prefix_hits += progress.computed
            self.prefix_queries += len(progress.prompt) if self.pages.share and progress.num_findable else 0
        return progress

    def make_room(self, progress: Progress) -> bool:
        """A page for the next position of a running request; False if it had to stop for it itself."""
        if progress.computed < len(progress.pages) * self.pages.page_size:
            return True
        while not self.pages.extend(progress.pages):
            last = self.running.pop()
            self._give_back(last)
            self.waiting[last.request.id] = last
            self.waiting.move_to_end(last.request.id, last=False)
            self.num_preemptions += 1
            if last is progress:
                return False
        return True

    def publish(self, progress: Progress, start: int, end: int) -> None:
        """Others may use the pages of the prompt that positions start .. end - 1 complete, from this step on."""
        keys, page_size = progress.keys or [], self.pages.page_size
        for index in range(start // page_size, min(end // page_size, len(keys))):
            self.pages.publish(progress.pages[index], keys[index])

    def _give_back(self, progress: Progress) -> None:
        self.pages.release(progress.pages)
        progress.pages, progress.computed = [], 0
