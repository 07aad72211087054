"""What clients are told of values that do not fit, and the fields that this server knows only to refuse.

A field that would change the answer, and that is not honoured here, takes the value that asks for nothing and no other;
so a client hears of it instead of being served something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core.core_schema import CoreSchema, custom_error_schema


@dataclass(frozen=True)
class Told:
    """Annotation: what a client hears, in place of pydantic's complaint (of a union, that of one of its branches).

    Args:
        message: without braces.
    """

    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of what is annotated, with this message."""
        return custom_error_schema(handler(source), "does_not_fit", custom_error_message=self.message)


_LEAVE = "is not supported; leave it out"

Refused = Annotated[None, Told(_LEAVE)]
Empty = Annotated[Annotated[list[Any], Field(max_length=0)] | None, Told(f"{_LEAVE}, or empty")]
EmptyObject = Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, Told(f"{_LEAVE}, or empty")]
OnlyFalse = Annotated[Literal[False] | None, Told("is not supported but as false")]
OnlyTrue = Annotated[Literal[True] | None, Told("is not supported but as true")]
OnlyOne = Annotated[Annotated[float, Field(ge=1, le=1)] | None, Told("is not supported but as 1")]
