"""What clients are told of values that do not fit, and the fields that this server knows only to refuse.

A field that would change the answer, and that is not honoured here, takes the value that asks for nothing and no other;
so a client hears of it instead of being served something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, WithJsonSchema
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


def _exactly(only: bool) -> Any:
    """`only`, and no number: to `Literal[False]`, 0 is false."""

    def check(value: bool) -> bool:
        if value is not only:
            raise ValueError(f"Input should be {only}")
        return value

    return Annotated[bool, AfterValidator(check), WithJsonSchema({"type": "boolean", "const": only})]


_LEAVE = "is not supported; leave it out"

Refused = Annotated[None, Told(_LEAVE)]
Empty = Annotated[Annotated[list[Any], Field(max_length=0)] | None, Told(f"{_LEAVE}, or empty")]
EmptyObject = Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, Told(f"{_LEAVE}, or empty")]
OnlyOne = Annotated[Annotated[float, Field(ge=1, le=1)] | None, Told("is not supported but as 1")]
if TYPE_CHECKING:
    OnlyFalse: TypeAlias = bool | None
    OnlyTrue: TypeAlias = bool | None
else:
    OnlyFalse = Annotated[_exactly(False) | None, Told("is not supported but as false")]
    OnlyTrue = Annotated[_exactly(True) | None, Told("is not supported but as true")]
