"""Saving while training goes on: the state is copied, a thread writes it, and a later step publishes it.

    saver = AsyncSaver(root, mesh, keep=3)
    saver.save(step, optimizer.pieces(), documents, layout_document)     returns when the copy is made
    ...                                                                   steps go on
    saver.poll()                                                          at a step boundary: publish if all are done
    saver.close()                                                         wait for what is in flight

The copy lies in buffers that are kept from save to save, so that memory is taken once: as much as this rank saves. The
thread touches only the buffers and this rank's files; it takes no part in any collective, which would get between those
of the training step. All exchange happens in `save`, `poll`, `flush` and `close`, on the caller's thread; every rank
calls them at the same steps. One save is in flight at a time; a second one waits for the first.

A generation counts when it is published, not when it is copied: a crash before the next `poll` leaves the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from skymoe.parallel.agree import any_of
from skymoe.parallel.checkpoint import OpenSave, close_save, open_save, write_save
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.together import together
from skymoe.weights.manifest import FileRecord
from skymoe.weights.pieces import SavedPiece
from skymoe.weights.slices import Box


@dataclass(frozen=True)
class _InFlight:
    save: OpenSave
    layout_document: Mapping[str, Any]
    written: Future[dict[str, FileRecord] | Exception]


class AsyncSaver:
    """Saves generations in the background. A context manager that calls `close`.

    Args:
        root: directory of the generations, on storage that all ranks share.
        mesh: the ranks; one alone is a world too.
        keep: how many generations stay.
    """

    def __init__(self, root: Path, mesh: Mesh, *, keep: int = 3) -> None:
        self._root, self._mesh, self._keep = root, mesh, keep
        self._buffers: dict[tuple[str, str, Box], Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._in_flight: _InFlight | None = None

    def save(
        self, step: int, pieces: Iterable[SavedPiece], documents: Mapping[str, Any], layout_document: Mapping[str, Any]
    ) -> Path | None:
        """Copy this rank's pieces and begin to write them. Every rank calls it.

        Args:
            step: training step.
            pieces: of this rank; what becomes of them after this call does not matter.
            documents: file stem -> what JSON can hold; of rank 0.
            layout_document: how the tensors are divided, for the manifest.

        Returns:
            The generation of the save before, if it was still in flight: it is published now.

        Raises:
            MachineError, FormatError, CheckpointError: of the save before, or of this one's beginning; the same on all
                ranks. Nothing is in flight then.
        """
        before = self.flush()
        copied = together(self._mesh, lambda: [self._copied(piece) for piece in pieces])
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)  # the copies were only begun
        opened = open_save(self._root, step, copied, documents, self._mesh)
        self._in_flight = _InFlight(opened, dict(layout_document), self._thread.submit(write_save, opened))
        return before

    def poll(self) -> Path | None:
        """Publish the save in flight if every rank has written its files; its directory, or None. Every rank calls it.

        Raises:
            MachineError, CheckpointError: it failed; the same on all ranks, and it is no longer in flight.
        """
        flight = self._in_flight
        if flight is None or any_of(not flight.written.done(), self._mesh.world, self._mesh.device):
            return None
        return self.flush()

    def flush(self) -> Path | None:
        """Wait for the save in flight and publish it; its directory, None when there is none. Raises as `poll`."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return None
        return close_save(flight.save, flight.written.result(), self._mesh, flight.layout_document, self._keep)

    def close(self) -> Path | None:
        """`flush`, and end the thread; harmless twice."""
        try:
            return self.flush()
        finally:
            self._thread.shutdown()
            self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the others may not be there any more: end the thread, agree on nothing
            self._in_flight = None
            self._thread.shutdown()

    def _copied(self, piece: SavedPiece) -> SavedPiece:
        """The piece in memory of our own."""
        key = (piece.stem, piece.name, piece.box)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != piece.tensor.shape or buffer.dtype != piece.tensor.dtype:
            pinned = piece.tensor.device.type == "cuda"
            buffer = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=pinned)
            self._buffers[key] = buffer
        buffer.copy_(piece.tensor.detach(), non_blocking=True)
        return piece._replace(tensor=buffer)
