"""Bytes of the tensors that are alive, at any time, on any device: what a pass keeps, and its peak.

Every tensor that an operation returns is seen on its way (a dispatch mode), its storage is counted once and forgotten
when it is freed. So it counts what is needed, not what an allocator holds back, and works on a CPU, whose allocator
counts nothing. What was there before the block is not counted; nor are buffers inside libraries (gloo, MKL).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While the block lasts: `now` bytes of tensors made in it, `peak` the most since `reset_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """From here on."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._see(value, is_new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._see(value, is_new=True)
        return result

    def _see(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if is_new else 0

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
