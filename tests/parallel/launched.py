"""Programs under a launcher, from outside: what they say, which sockets they open, whom they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TOY = Path(__file__).with_name("toy.py")
ROOT = TOY.parents[2]
_LISTENS = "0A"
_LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")

# The launcher as a program; `skymoe train --nproc` is the same for one command.
_LAUNCH = """if True:
    import sys
    from skymoe.base.log import setup_logging
    from skymoe.parallel.launcher import launch
    setup_logging()
    sys.exit(launch([sys.executable, *sys.argv[3:]], int(sys.argv[1]), max_restarts=int(sys.argv[2])))
"""


class Launched:
    """A running command: a launcher and its ranks. Everything that it says is in one file."""

    def __init__(self, command: Sequence[str], output: Path, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def wait(self, timeout: float = 120.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end in {timeout} s; it said:\n{self.said}") from None

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"it ended too early:\n{self.said}"
            assert time.monotonic() < deadline, f"it never happened:\n{self.said}"
            time.sleep(0.02)

    def tree(self) -> list[int]:
        """Process ids of the launcher and all that it has started."""
        return family(self.process.pid)

    def ranks(self) -> dict[int, int]:
        """Process id of every rank that runs."""
        found = {}
        for pid in self.tree()[1:]:
            rank = environment_of(pid).get("RANK")
            if rank is not None:
                found[int(rank)] = pid
        return found


@contextmanager
def launched(command: Sequence[str], directory: Path, **environment: str) -> Iterator[Launched]:
    """Run `command`; at the end of the block nothing of it is left, whatever happened."""
    running = Launched(command, directory / "output.txt", **environment)
    try:
        yield running
    finally:
        for pid in running.tree():
            end(pid)
        running.process.wait()


@contextmanager
def launched_toy(
    num_ranks: int, *arguments: object, directory: Path, restarts: int = 0, script: Path = TOY, **environment: str
) -> Iterator[Launched]:
    """toy.py, or another script, under our own launcher."""
    words = [str(num_ranks), str(restarts), str(script), *map(str, arguments)]
    with launched([sys.executable, "-c", _LAUNCH, *words], directory, **environment) as running:
        yield running


def torchrun(*arguments: object) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


def family(root: int) -> list[int]:
    """`root` and its descendants that are alive."""
    parents: dict[int, int] = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(directory.name)] = int(fields[1])
    found = [root] if root in parents else []
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def environment_of(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.partition("=")[::2] for item in text.split("\0") if "=" in item)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def listening(pids: Sequence[int]) -> list[str]:
    """Local addresses (hexadecimal, with port) on which the processes listen, TCP over IPv4 and IPv6."""
    inodes = set()
    for pid in pids:
        try:
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
        except OSError:
            continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and fields[9] in inodes:
                found.append(fields[1])
    return found


def outside_loopback(addresses: Sequence[str]) -> list[str]:
    return [address for address in addresses if address.partition(":")[0] not in _LOOPBACK]
