"""An action that succeeds on all ranks or fails on all, with the same error that names the rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from skymoe.base.errors import CheckpointError, ConfigError, FormatError, MachineError, SkymoeError
from skymoe.parallel.agree import agree, any_of
from skymoe.parallel.mesh import Mesh

_KINDS: dict[str, type[SkymoeError]] = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError, FormatError, MachineError)
}
_SEPARATOR = "\x1f"  # of the fields of an error on its way

T = TypeVar("T")


def together(mesh: Mesh, action: Callable[[], T], *, undo: Callable[[], object] | None = None) -> T:
    """What `action` returns on this rank, once it has succeeded on every rank. All ranks call it at the same place.

    Args:
        mesh: the ranks.
        action: no collectives in it.
        undo: called when it failed anywhere; all ranks have done so before one of them raises.

    Raises:
        SkymoeError: it failed somewhere: the same error on all ranks, `rank 3: ...` in front.
        RuntimeError: it failed with an error that is no answer for the user; on the failing rank that error itself.
    """
    try:
        value = action()
    except Exception as error:
        fail_together(mesh, error, undo=undo)
        raise  # not reached: this rank has failed
    fail_together(mesh, None, undo=undo)
    return value


def fail_together(mesh: Mesh, error: Exception | None, *, undo: Callable[[], object] | None = None) -> None:
    """Return when `error` is None on every rank; else raise as `together`."""
    told = agree(error is None, _told(error, mesh.rank), mesh.world, mesh.device)
    if told is None:
        return
    if undo is not None:
        undo()
        any_of(True, mesh.world, mesh.device)
    if error is not None and (mesh.world.handle is None or not _is_ours(error)):
        raise error
    rank, kind, what, where, why, hint = (told.split(_SEPARATOR) + [""] * 5)[:6]
    if kind not in _KINDS:
        raise RuntimeError(f"rank {rank}: {what}") from error
    raise _KINDS[kind](f"rank {rank}: {what}", where=where, why=why, hint=hint) from error


def _told(error: Exception | None, rank: int) -> str:
    if error is None:
        return ""
    if isinstance(error, SkymoeError) and _is_ours(error):
        fields = [type(error).__name__, error.what[:600], error.where[:500], error.why[:400], error.hint[:200]]
    else:
        fields = ["", f"{type(error).__name__}: {error}"[:1000]]
    return _SEPARATOR.join([str(rank), *fields])


def _is_ours(error: Exception) -> bool:
    return type(error).__name__ in _KINDS
