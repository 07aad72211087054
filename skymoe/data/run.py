"""`skymoe data build`: text files -> tokenizer -> token files, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skymoe.data.config import BuildConfig


@dataclass(frozen=True)
class SplitReport:
    """One side of the data set. `prefix` opens with IndexedDataset; None when no document fell on this side."""

    prefix: Path | None
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    out: Path
    train: SplitReport
    valid: SplitReport
    tokenizer_dir: Path
    vocab_size: int
    bytes_per_token: float
    files: int
    skipped: dict[str, int]  # reason -> documents
    notes: tuple[str, ...]
    seconds: float


def run(config: BuildConfig) -> BuildReport:
    """Build the data set that `config` describes. Raises FormatError for unreadable input, nothing is left behind."""
    raise NotImplementedError
