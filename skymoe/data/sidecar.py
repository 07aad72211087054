"""The sidecar `prefix.json` beside a token file: who it is, how much it holds, what its bytes hash to."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skymoe.base.errors import FormatError, printable
from skymoe.base.strict_json import read_json_object

_MAX_BYTES = 1 << 20


class Sidecar(BaseModel):
    """Counts and hashes of one token file. Unknown keys are left alone: a later version may know more."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    name: str
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    bytes: int | None = Field(ge=0)
    """Length in UTF-8 of the text that became these tokens; None when unknown."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the .bin followed by the .idx."""
    tokenizer_sha256: str | None
    """SHA-256 of the tokenizer.json."""


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar at `path`; None when there is none. Raises FormatError."""
    if not path.exists():
        return None
    content = read_json_object(path, max_bytes=_MAX_BYTES)
    try:
        return Sidecar.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = printable(".".join(map(str, first["loc"])), 60)
        raise FormatError(f"{key}: {printable(first['msg'], 200)}", where=path) from error
