"""An engine in a process of its own: `python -m skymoe.engine.worker --socket N`, behind a socket that it inherits.

The loop is: read what has been said without waiting (or wait, when there is nothing to do), run one step, say what came
of it. What is said is in messages.py. Who started us decides when to end: Ctrl-C in a terminal reaches every process of
its group, so SIGINT is ignored here; a closed socket, a `stop`, or the death of the parent (lifeline.py) end the loop.

A request that cannot be taken in, or that fails on its way, is answered with Finish.ERROR; the others go on. When a
rank has died, or the engine itself has a defect, that is said as `failed` and the process ends with its exit code.
Standard output and error are the parent's.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from skymoe.base.errors import FormatError, SkymoeError
from skymoe.base.log import logger, setup_logging
from skymoe.engine.config import EngineConfig
from skymoe.engine.engine import Engine
from skymoe.engine.messages import (
    Abort,
    Add,
    AskStats,
    Command,
    Failed,
    Inbox,
    Loading,
    News,
    Outputs,
    Ready,
    Start,
    Stats,
    Stop,
    pack,
    read_command,
)
from skymoe.engine.output import Finish, TokenOutput
from skymoe.parallel.lifeline import die_with_launcher

_RECEIVE = 1 << 18
_LOOK_S = 1.0  # how often, without work, ranks are looked after
_DEFECT = 70


class Channel:
    """Messages over the socket to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._inbox = Inbox(read_command)
        self.is_open = True

    def receive(self, wait_s: float) -> list[Command]:
        """What has been said, waiting at most so long for the first of it.

        Raises:
            FormatError: that was no message, or the other side ended within one.
        """
        heard: list[Command] = []
        while self.is_open and select.select([self._socket], [], [], 0.0 if heard else wait_s)[0]:
            data = self._socket.recv(_RECEIVE)
            heard += self._inbox.feed(data)
            self.is_open = bool(data)
            wait_s = 0.0
        if not self.is_open and not self._inbox.is_empty:
            raise FormatError("the server ended in the middle of a message")
        return heard

    def say(self, message: News) -> None:
        """Send `message`, whole; a server that has gone away closes the channel."""
        try:
            self._socket.sendall(pack(message))
        except (BrokenPipeError, ConnectionResetError):
            self.is_open = False


def serve(engine: Engine, channel: Channel) -> None:
    """Answer until the server says stop or goes away.

    Raises:
        MachineError: a rank has died.
    """
    while channel.is_open:
        commands = channel.receive(0.0 if engine.has_work else _LOOK_S)
        if not all([_obey(engine, channel, command) for command in commands]):
            return
        if engine.has_work:
            say_outputs(channel, engine.step())
        elif not commands:
            engine.alive()


def _obey(engine: Engine, channel: Channel, command: Command) -> bool:
    """Do what is said; False when that is to stop."""
    match command:
        case Add():
            _add(engine, channel, command)
        case Abort():
            if engine.abort(command.id):
                say_outputs(channel, [TokenOutput(request_id=command.id, finish=Finish.ABORT)])
        case AskStats():
            channel.say(Stats(engine.stats()))
        case Stop():
            return False
        case Start():
            logger.warning("a second start is not heard")
    return True


def _add(engine: Engine, channel: Channel, command: Add) -> None:
    """Take a request in; whatever is wrong with it ends this request and nothing else."""
    try:
        engine.add(command.id, command.prompt, command.params)
        return
    except SkymoeError as error:
        told = f"{error.what} ({error.hint})" if error.hint else error.what
    except Exception as error:
        logger.exception("a request cannot be taken in")
        told = f"this request cannot be taken in: {type(error).__name__}"
    say_outputs(channel, [TokenOutput(request_id=command.id, finish=Finish.ERROR, error=told)])


def say_outputs(channel: Channel, outputs: Sequence[TokenOutput]) -> None:
    """Send `outputs` in as many frames as they need; one that fits none ends its request with an error."""
    if not outputs:
        return
    try:
        channel.say(Outputs(tuple(outputs)))
    except FormatError as error:
        if len(outputs) > 1:
            half = len(outputs) // 2
            say_outputs(channel, outputs[:half])
            say_outputs(channel, outputs[half:])
        else:
            name = outputs[0].request_id
            channel.say(Outputs((TokenOutput(request_id=name, finish=Finish.ERROR, error=error.what),)))


def run(connection: socket.socket) -> int:
    """Load what `start` names, answer, end; returns the exit code."""
    channel = Channel(connection)
    try:
        config = _first(channel)
        if config is None:
            return 0
        with Engine(config, loaded=lambda done, total: channel.say(Loading(done, total))) as engine:
            channel.say(Ready(engine.info))
            serve(engine, channel)
        return 0
    except SkymoeError as error:
        failed = Failed(error.what, error.where, error.why, error.hint, error.exit_code)
    except Exception as error:
        logger.exception("the engine has a defect")
        failed = Failed(f"the engine has a defect: {type(error).__name__}: {error}"[:500], exit_code=_DEFECT)
    with suppress(FormatError, OSError):
        channel.say(failed)
    return failed.exit_code


def _first(channel: Channel) -> EngineConfig | None:
    """The config that the server starts us with; None when it went away, or changed its mind.

    Raises:
        FormatError: it said something else.
    """
    while channel.is_open:
        for command in channel.receive(_LOOK_S):
            if isinstance(command, Start):
                return command.config
            if isinstance(command, Stop):
                return None
            raise FormatError("the first message must be `start`")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The process: see the module."""
    parser = argparse.ArgumentParser(prog="python -m skymoe.engine.worker", description="An engine behind a socket.")
    parser.add_argument("--socket", type=int, required=True, help="number of the inherited socket")
    descriptor = parser.parse_args(arguments).socket
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup_logging()
    with socket.socket(fileno=descriptor) as connection:
        connection.set_inheritable(False)  # followers have nothing to say to the server
        return run(connection)


if __name__ == "__main__":
    sys.exit(main())
