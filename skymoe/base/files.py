"""Files that are either there whole or not there at all.

A crash, a full disk or Ctrl-C must never leave something that looks finished. So nothing is written under its final
name: bytes go to a hidden sibling, are pushed to the disk (`fsync`), take their name in one rename, and the directory
that holds the name is pushed to the disk too. A failure of the machine (no space, no permission) becomes a
`MachineError`; any other error rises as it is.

Long work need not begin anew after a kill: a `resumable_directory` has a fixed hidden name, keeps what is done, and is
continued by a run with the same fingerprint. As runs share that name, it is the one thing here that is locked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from skymoe.base.errors import ConfigError, MachineError, printable
from skymoe.base.log import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MACHINE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE,
}  # fmt: skip

PART_SUFFIX = ".part"  # of a file that is still being written, where a name is not hidden

_PATH_ERRNOS = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


@contextmanager
def machine_errors(where: object, *, paths: bool = True) -> Iterator[None]:
    """Turn the operating system's refusals inside the block into our errors.

    Space, permission and I/O are the machine's (MachineError). A path that leads nowhere is the user's (ConfigError),
    where the block deals with paths that the user gave (`paths`).
    """
    try:
        yield
    except OSError as error:
        if paths and error.errno in _PATH_ERRNOS:
            path = printable(error.filename or where)
            raise ConfigError(f"this path cannot be used: {error.strerror}", where=path) from error
        if error.errno not in _MACHINE_ERRNOS:
            raise
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        path = f" ({printable(error.filename)})" if error.filename and error.filename != where else ""
        raise MachineError(f"the system refuses: {error.strerror}{path}", where=where, hint=hint) from error


def fsync_dir(path: Path) -> None:
    """Push the names in directory `path` to the disk; without it a rename can be lost in a power cut."""
    if os.name == "nt":  # Windows cannot open a directory; its renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Push the content of the file at `path` to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_no_file(path: Path) -> None:
    """Raise ConfigError when no file can be at `path`: it is a directory, or there is none to hold it.

    A command that works for long asks this of its outputs first.
    """
    told = "this path cannot be used"
    with machine_errors(path):
        if path.is_dir():
            raise ConfigError(f"{told}: it is a directory", where=path, hint="the name of a file in it")
        if not path.parent.is_dir():
            lacking = f"there is no directory {printable(path.parent)}"
            raise ConfigError(f"{told}: {lacking}", where=path, hint="make it first, or choose another")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` at `path` so that a reader sees the old content or the new one, never a part.

    Raises:
        ConfigError: `path` is a directory, or there is none to hold it.
        MachineError: no space, no permission. The old content is untouched.
    """
    refuse_no_file(path)
    temporary = _hidden_sibling(path, "tmp")
    with machine_errors(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                error.filename = error.filename2 = None  # the user knows nothing of the hidden sibling
            raise
        fsync_dir(path.parent)


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(final: Path, overwrite: bool) -> None:
    """Raise ConfigError when `final` cannot be an output directory, because something is there that would be lost.

    An output takes its place by a rename. Done to the working directory, that would leave the caller in a directory
    that is gone; so it is refused, empty or not.
    """
    final = _with_a_name(final)
    if not final.exists() and not final.is_symlink():
        return
    if final.is_symlink() or not final.is_dir():
        raise ConfigError("the output exists and is not a directory", where=final, hint="choose another name")
    if _holds_working_directory(final):
        why = "the output takes the place of what is there"
        raise ConfigError("the output is the working directory, or above it", where=final, why=why, hint="a new name")
    if not overwrite and any(final.iterdir()):
        raise ConfigError(
            "the output directory exists and is not empty",
            where=final,
            why="nothing is overwritten unless you ask for it",
            hint="choose another directory, or replace this one: --overwrite (in Python: overwrite=True)",
        )


def refuse_source(final: Path, source: Path) -> None:
    """Raise ConfigError when `source` is `final` or lies in it: replacing the output would remove it."""
    if source.resolve().is_relative_to(final.resolve()):
        what = "the output is the source" if source.resolve() == final.resolve() else "the source lies in the output"
        raise ConfigError(what, where=final, hint="choose another directory")


@contextmanager
def staging_directory(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden sibling of `final` to write into; it becomes `final` when the block ends well, and vanishes otherwise.

    With `overwrite` an existing directory is moved aside first and removed last; a crash between these two renames
    leaves it beside `final`, under a name that begins with `.` and ends in `.old-...`.

    Raises:
        ConfigError: `final` exists and is not an empty directory, and `overwrite` is not given.
        MachineError: no space, no permission.
    """
    final = _with_a_name(final)
    refuse_existing(final, overwrite)
    staging = _hidden_sibling(final, "tmp")
    with machine_errors(final):
        staging.mkdir(parents=True)
        try:
            yield staging
            fsync_tree(staging)
            _publish(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def resumable_directory(final: Path, fingerprint: str, *, overwrite: bool = False) -> Iterator[Path]:
    """As `staging_directory`, but a killed or interrupted run leaves its work for the next one with `fingerprint`.

    The work is in `.NAME.partial/` beside `final`: `content/`, which becomes `final`, and `fingerprint`, which says of
    what it is the beginning. SIGKILL, SIGTERM and Ctrl-C leave it there, and so does a refusal of the machine (a full
    disk) when files in it are finished. A run with the same fingerprint finds it, less half-written small files
    (`write_atomic`); a run with another one throws it away. Any other error removes it. It is locked while the block
    runs, where the system has `flock`.

    Args:
        final: the directory to create.
        fingerprint: of everything that decides the content: inputs, options, version of the program.
        overwrite: replace `final` when it exists.

    Raises:
        ConfigError: `final` exists and is not an empty directory, and `overwrite` is not given.
        MachineError: another run is writing `final`; no space, no permission.
    """
    final = _with_a_name(final)
    refuse_existing(final, overwrite)
    partial = final.with_name(f".{final.name}.partial")
    content = partial / "content"
    with machine_errors(final), _locked(partial / "fingerprint", final) as record:
        try:
            refuse_existing(final, overwrite)  # a run that held the lock may have published it
            _keep_or_clear(content, record, fingerprint)
            yield content
            fsync_tree(content)
            _publish(content, final)
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            if interrupted or (_is_of_the_machine(error) and _holds_finished_files(content)):
                what = "interrupted" if interrupted else "what is finished is kept"
                logger.info("%s: the same command goes on from here (or remove %s)", what, printable(partial))
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def fsync_tree(directory: Path) -> None:
    """Push every file and every directory below `directory`, and itself, to the disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                fsync_file(path)
        fsync_dir(Path(parent))


@contextmanager
def _locked(path: Path, final: Path) -> Iterator[BinaryIO]:
    """The file at `path`, made if need be, open for reading and writing, and nobody else's."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _lock(file, final)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return
        # The run before us removed the file between our opening and our locking it.


def _lock(file: BinaryIO, final: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        hint = "wait for it; or stop it, and the same command again goes on where it stopped"
        raise MachineError("another run is writing this directory", where=final, hint=hint) from error
    except OSError as error:  # some network file systems have no locks
        logger.debug("no lock on %s: %s", printable(file.name), error.strerror)


def _keep_or_clear(content: Path, record: BinaryIO, fingerprint: str) -> None:
    """Leave in `content` what a run with the same fingerprint did; otherwise make it empty and note whose it is."""
    record.seek(0)
    if record.read() == fingerprint.encode():
        content.mkdir(exist_ok=True)
        for leftover in content.rglob(".*.tmp-*"):
            leftover.unlink()
        return
    if content.exists():
        logger.info("%s is the beginning of something else: begun anew", printable(content.parent))
        shutil.rmtree(content)
    record.truncate(0)
    content.mkdir()
    record.write(fingerprint.encode())
    record.flush()
    os.fsync(record.fileno())
    fsync_dir(content.parent)


def _publish(staging: Path, final: Path) -> None:
    aside = None
    if final.exists():
        aside = _hidden_sibling(final, "old")
        os.rename(final, aside)
    try:
        os.rename(staging, final)
    except BaseException:
        if aside is not None:
            os.rename(aside, final)
        raise
    fsync_dir(final.absolute().parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _with_a_name(final: Path) -> Path:
    """`final`, spelled so that it has siblings: `.` and `..` have no name to hide one behind."""
    return final.resolve() if final.name in ("", "..") else final


def _holds_working_directory(directory: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(directory.resolve())
    except FileNotFoundError:  # somebody removed it
        return False


def _is_of_the_machine(error: BaseException) -> bool:
    return isinstance(error, MachineError) or (isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS)


def _holds_finished_files(content: Path) -> bool:
    """Whether a run that goes on would find anything to keep: a file that has its final name."""
    return any(path.is_file() and path.suffix != PART_SUFFIX and path.name[0] != "." for path in content.rglob("*"))


def _hidden_sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")
