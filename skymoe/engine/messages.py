"""What server and engine tell each other: frames of JSON over a socket pair. No torch.

    frame = length of the payload (4 bytes, big-endian, at most 64 MiB), payload (one JSON object in UTF-8)

The server says `start` first, and once the engine is `ready` it says `add`, `abort`, `stats`, `stop`. The engine says
`loading` while it reads weights, `ready` once, then `outputs` after steps that drew tokens and `stats` when asked; or
`failed`, after which it ends with the exit code that is named there. An abort is answered by one output with
Finish.ABORT where the request was still there, and by nothing where it had ended already.

Why JSON and no pickle: whoever can write to a socket that unpickles can run anything in the process behind it; three
other engines had to learn that. Payloads are read strictly into the dataclasses of `params.py` and `output.py`: an
unknown key, a number that is text, NaN, a parameter out of bounds are refused, on both sides. Frames are read without
waiting for more than what is there (`Inbox`), so that both an event loop and a loop of steps can use them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from skymoe.base.errors import FormatError, printable
from skymoe.base.module import module_command
from skymoe.engine.config import EngineConfig
from skymoe.engine.output import EngineInfo, EngineStats, TokenOutput
from skymoe.engine.params import SamplingParams

MAX_FRAME = 64 << 20
MAX_ID = 200

_LENGTH = struct.Struct(">I")
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

_Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
_Token: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True, config=_STRICT)
class Start:
    """Load this model; the first message, and said once."""

    config: EngineConfig
    type: Literal["start"] = "start"


@dataclass(frozen=True, config=_STRICT)
class Add:
    """Answer this prompt. `id` names the request in all that follows."""

    id: _Id
    prompt: tuple[_Token, ...]
    params: SamplingParams
    type: Literal["add"] = "add"


@dataclass(frozen=True, config=_STRICT)
class Abort:
    """Forget the request `id`."""

    id: _Id
    type: Literal["abort"] = "abort"


@dataclass(frozen=True, config=_STRICT)
class AskStats:
    """Say how things stand."""

    type: Literal["stats"] = "stats"


@dataclass(frozen=True, config=_STRICT)
class Stop:
    """End: running requests are dropped, followers end, exit code 0."""

    type: Literal["stop"] = "stop"


@dataclass(frozen=True, config=_STRICT)
class Loading:
    """`done` of `total` layers are read."""

    done: int
    total: int
    type: Literal["loading"] = "loading"


@dataclass(frozen=True, config=_STRICT)
class Ready:
    """Requests can be added."""

    info: EngineInfo
    type: Literal["ready"] = "ready"


@dataclass(frozen=True, config=_STRICT)
class Outputs:
    """News of requests."""

    outputs: tuple[TokenOutput, ...]
    type: Literal["outputs"] = "outputs"


@dataclass(frozen=True, config=_STRICT)
class Stats:
    """The answer to AskStats."""

    stats: EngineStats
    type: Literal["stats"] = "stats"


@dataclass(frozen=True, config=_STRICT)
class Failed:
    """The engine ends: the fields of a SkymoeError, and the exit code (70: a defect of ours)."""

    what: str
    where: str = ""
    why: str = ""
    hint: str = ""
    exit_code: int = 3
    type: Literal["failed"] = "failed"


Command: TypeAlias = Start | Add | Abort | AskStats | Stop
News: TypeAlias = Loading | Ready | Outputs | Stats | Failed

_COMMANDS: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="type")])
_NEWS: TypeAdapter[News] = TypeAdapter(Annotated[News, Field(discriminator="type")])


def pack(message: Command | News) -> bytes:
    """`message` as a frame.

    Raises:
        FormatError: it is longer than a frame may be, or has a number or text that JSON cannot say.
    """
    adapter: TypeAdapter[Any] = _COMMANDS if isinstance(message, Command) else _NEWS
    if isinstance(message, Add):  # the mapping may be of a kind that the writer of JSON does not know
        params = replace(message.params, logit_bias=dict(message.params.logit_bias))
        message = Add(message.id, message.prompt, params)
    try:
        payload = adapter.dump_json(message)
    except ValueError as error:  # half of a surrogate pair
        raise FormatError(f"a message cannot be written: {printable(error)}") from error
    if len(payload) > MAX_FRAME:
        raise FormatError(f"a message of {len(payload)} bytes", why=f"a frame has at most {MAX_FRAME}")
    return _LENGTH.pack(len(payload)) + payload


def read_command(payload: bytes) -> Command:
    """What the server says. Raises FormatError."""
    return _read(_COMMANDS, payload)


def read_news(payload: bytes) -> News:
    """What the engine says. Raises FormatError."""
    return _read(_NEWS, payload)


M = TypeVar("M")


def _read(adapter: TypeAdapter[M], payload: bytes) -> M:
    try:
        return adapter.validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise FormatError(f"a message between server and engine: {printable(place)}: {first['msg']}") from error


class Inbox(Generic[M]):
    """Bytes in, messages out, as they become whole.

    Args:
        read: `read_command` or `read_news`.
    """

    def __init__(self, read: Callable[[bytes], M]) -> None:
        self._read = read
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """The messages that `data` completes. Raises FormatError; nothing can be read after that."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > MAX_FRAME:
                raise FormatError(f"a frame of {length} bytes between server and engine", why=f"at most {MAX_FRAME}")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            payload = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield self._read(payload)

    @property
    def is_empty(self) -> bool:
        """Whether no frame is half read: else the other side has ended in the middle of a word."""
        return not self._bytes


def worker_command(descriptor: int) -> list[str]:
    """The command that starts an engine behind the inherited socket `descriptor`."""
    return module_command("skymoe.engine.worker", "--socket", descriptor)
