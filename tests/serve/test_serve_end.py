"""How a server ends when its engine does not answer: told once within seconds, told twice at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from serve.servers import ENGINE, engine_of, make_model, server, start

_SECONDS = 15
"""what a machine under load may add; the server's own bound is 5"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "fox")


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_a_stopped_engine_is_not_waited_for(model: Path) -> None:
    with server(model) as running:
        engine = engine_of(running)
        engine.suspend()
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(_SECONDS) == 0
        assert not psutil.pid_exists(engine.pid) and "Traceback" not in running.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_sigterm_does_not_wait_for_the_engine(model: Path, number: signal.Signals) -> None:
    """Nobody is in, and the server waits for its engine alone."""
    with server(model) as running:
        engine = engine_of(running)
        engine.suspend()
        running.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining" in running.log())
        running.process.send_signal(number)
        assert running.wait(_SECONDS) == 130
        assert not psutil.pid_exists(engine.pid) and "Traceback" not in running.log()


@pytest.mark.parametrize("stopped", [False, True])
def test_sigterm_while_loading(model: Path, stopped: bool) -> None:
    """An engine that loads hears nothing; it is not waited for."""
    running = start(model, engine={"load_s": 600}, ready=False)
    try:
        children = psutil.Process(running.process.pid).children
        wait_for(lambda: any(str(ENGINE) in child.cmdline() for child in children()))
        engine = engine_of(running)
        if stopped:
            engine.suspend()
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(_SECONDS) == 0
        assert not psutil.pid_exists(engine.pid) and "Traceback" not in running.log()
    finally:
        running.process.kill()
        running.process.wait()
