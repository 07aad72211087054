"""What rank 0 and a follower tell each other outside of steps: the task at the start, and the reason of an end.

The task is one line of JSON on the follower's standard input; the reason is JSON in the store where the ranks meet.
Both are read strictly, into these classes and nothing else.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from skymoe.base.errors import ConfigError, FormatError, MachineError, SkymoeError, printable
from skymoe.engine.config import EngineConfig
from skymoe.spec.serving_plan import ServingPlan

MAX_LINE = 8 << 20
LOST = 4  # exit code of a follower that ends because others have
_KINDS: dict[str, type[SkymoeError]] = {"config": ConfigError, "format": FormatError, "machine": MachineError}


class Assignment(BaseModel):
    """Who a follower is, and of what.

    Attributes:
        rank, size: its place.
        port: of the store, on 127.0.0.1.
        config, plan: the engine's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(ge=1, le=1024)
    size: int = Field(ge=2, le=1024)
    port: int = Field(ge=1, le=65535)
    config: EngineConfig
    plan: ServingPlan


class LastWord(BaseModel):
    """Why a follower ends."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["config", "format", "machine", "defect"]
    what: str = Field(max_length=4096)
    where: str = Field(default="", max_length=4096)
    why: str = Field(default="", max_length=4096)
    hint: str = Field(default="", max_length=4096)

    def as_error(self, who: str) -> SkymoeError:
        """To be raised on rank 0, which speaks for all."""
        if self.kind == "defect":
            return MachineError(f"{who} failed: {self.what}", hint="its traceback is on standard error")
        return _KINDS[self.kind](self.what, where=self.where, why=self.why or f"found by {who}", hint=self.hint)


def last_word(error: BaseException) -> LastWord:
    """What to tell rank 0 of `error`."""
    for kind, of in _KINDS.items():
        if isinstance(error, of):
            texts = {name: getattr(error, name)[:4096] for name in ("what", "where", "why", "hint")}
            return LastWord(kind=kind, **texts)  # type: ignore[arg-type]
    return LastWord(kind="defect", what=printable(f"{type(error).__name__}: {error}", 1000))
