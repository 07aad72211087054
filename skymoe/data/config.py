"""What `skymoe data build` is asked: which text, which tokenizer, where to."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field, model_validator

from skymoe.base.config import Config

_SOURCE_FILES = (".py", ".md", ".rst", ".c", ".h", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh")


class InputFormat(StrEnum):
    """How an input becomes documents. `auto` goes by the suffix; in a directory, by the suffix of each file."""

    AUTO = "auto"
    TXT = "txt"
    JSONL = "jsonl"
    PARQUET = "parquet"
    SOURCE = "source"


class TextUnit(StrEnum):
    """What one document of a txt file is."""

    FILE = "file"
    PARAGRAPH = "paragraph"
    LINE = "line"


class BadDocument(StrEnum):
    """What happens to bytes that are not UTF-8, lines that are not JSON and records without text."""

    REFUSE = "refuse"
    SKIP = "skip"


class BuildConfig(Config):
    """One data set: `out/train.{bin,idx,json}`, `out/valid.*`, `out/tokenizer/` and `out/report.json`."""

    inputs: tuple[Path, ...] = Field(min_length=1)
    """Files (txt, jsonl, parquet, sources; each also as .gz, parquet excepted) and directories of them."""
    out: Path
    """Directory to create. It appears whole or not at all."""
    name: str = ""
    """Name of the data set; default: the last part of `out`."""
    overwrite: bool = False
    """Replace `out` when it exists."""

    format: InputFormat = InputFormat.AUTO
    """How to read the inputs: auto, txt, jsonl, parquet, source."""
    text_key: str = Field("text", min_length=1)
    """The key (jsonl) or column (parquet) that holds the text."""
    extensions: tuple[str, ...] = _SOURCE_FILES
    """Suffixes of the source files to take from a directory; each file is one document."""
    text_unit: TextUnit = TextUnit.FILE
    """What one document of a txt file is: the file, a paragraph (blank lines separate), a line."""
    max_document_bytes: int = Field(1 << 20, ge=1 << 10, le=1 << 28)
    """Longer documents are cut, at a line end where there is one."""
    bad_documents: BadDocument = BadDocument.REFUSE
    """Bytes that are not UTF-8, lines that are not JSON, records without text: refuse, or skip and count."""

    tokenizer: Path | None = None
    """A Hugging Face directory or a tokenizer.json; default: a byte-level BPE is trained on the training documents."""
    eos_token: str | None = None
    """The token after each document; default: the one the tokenizer names."""
    vocab_size: int = Field(32_000, ge=258, le=1 << 20)
    """Size of the trained vocabulary."""
    tokenizer_train_bytes: int = Field(100_000_000, ge=1 << 10)
    """About how much text the vocabulary is trained on; documents are sampled by their hash."""

    validation_share: float = Field(0.005, ge=0.0, le=0.5)
    """Share of the documents held out, chosen by the hash of their text: equal documents stay together."""
    seed: int = Field(0, ge=0)
    """Which documents are held out."""

    @model_validator(mode="after")
    def _extensions_begin_with_a_dot(self) -> BuildConfig:
        if wrong := [extension for extension in self.extensions if not extension.startswith(".")]:
            raise ValueError(f"extensions begin with a dot, got {wrong}")
        return self

    @property
    def dataset_name(self) -> str:
        """`name`, or the last part of `out`."""
        return self.name or self.out.absolute().name
