"""The parent's side of the process that renders chat templates (`chat_render`). No torch, and no Jinja here.

One process renders for all, one conversation at a time; a template takes milliseconds. It is started when it is needed,
and again after a template that went over a limit has ended it. It ends with its standard input, so with this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skymoe.base.errors import ConfigError, FormatError, MachineError, MissingExtraError, printable

_PROGRAM = Path(__file__).with_name("chat_render.py")  # by its path: it needs nothing of ours
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ")  # no secrets
_START_SECONDS = 60.0  # for an interpreter on a machine with better things to do
_GRACE_SECONDS = 5.0  # the child's own alarm comes first


class OverLimitError(ConfigError):
    """A template went over a limit of its process, which is gone."""


class RenderProcess:
    """Renders templates, under limits.

    Args:
        setup: the first frame, as in `chat_render`.
        where: the template's file, named in errors.

    Raises:
        MissingExtraError: the package `jinja2` is not installed.
    """

    def __init__(self, setup: Mapping[str, Any], where: object) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise MissingExtraError("rendering chat templates", "serve")
        self._setup = setup
        self._where = where
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process, and read the templates.

        Raises:
            FormatError: they cannot be used.
            MachineError: the process cannot be started.
        """
        with self._lock:
            self._running()

    def render(self, template: str, variables: Mapping[str, Any], special: Mapping[str, Any]) -> str:
        """The text of template `template`.

        Raises:
            ConfigError: the template refuses the conversation, fails, or goes over a limit.
            MachineError: the process cannot be started.
        """
        with self._lock:
            process = self._running()
            frame = {"template": template, "variables": variables, "special": special}
            return self._ask(process, frame, float(self._setup["seconds"]) + _GRACE_SECONDS)

    @property
    def pid(self) -> int | None:
        """Of the process, while it lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._closed = True
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise MachineError("the chat template is closed")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", str(_PROGRAM)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise MachineError(f"no process for the chat template can be started: {error.strerror}") from error
        process = self._process
        self._ask(process, self._setup, float(self._setup["seconds"]) + _START_SECONDS)
        return process

    def _ask(self, process: subprocess.Popen[bytes], frame: Mapping[str, Any], seconds: float) -> str:
        """The text in the answer to `frame`."""
        try:
            answer = _exchange(process, frame, time.monotonic() + seconds)
        except (OSError, EOFError, TimeoutError) as error:
            process.kill()
            by_alarm = process.wait() == -signal.SIGALRM or isinstance(error, TimeoutError)
            self._end()
            limit = f"it takes more than {self._setup['seconds']:g} seconds"
            raise self._failure(limit if by_alarm else "its process ended", frame, OverLimitError) from error
        except BaseException:  # an interrupt: what the process answers later would be taken for the next answer
            self._end()
            raise
        if "error" in answer:
            if frame is self._setup:
                self._end()
            raise self._failure(printable(answer["error"], 500), frame)
        return str(answer["text"])

    def _failure(
        self, why: str, frame: Mapping[str, Any], kind: type[ConfigError] = ConfigError
    ) -> FormatError | ConfigError:
        if frame is self._setup:
            return FormatError("the chat template cannot be used", where=self._where, why=why)
        return kind("the chat template cannot render this conversation", where=self._where, why=why)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _exchange(process: subprocess.Popen[bytes], frame: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    data = json.dumps(frame).encode()
    view = memoryview(struct.pack(">I", len(data)) + data)
    while view:  # the process reads a frame to its end before it does anything else
        view = view[os.write(process.stdin.fileno(), view) :]
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        (length,) = struct.unpack(">I", _read(process.stdout.fileno(), 4, selector, deadline))
        answer: dict[str, Any] = json.loads(_read(process.stdout.fileno(), length, selector, deadline))
    return answer


def _read(file: int, size: int, selector: selectors.BaseSelector, deadline: float) -> bytes:
    parts: list[bytes] = []
    while size:
        if not selector.select(max(deadline - time.monotonic(), 0)):
            raise TimeoutError
        part = os.read(file, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
