"""`skymoe data build`: text files -> tokenizer -> token files, whole or not at all.

Two passes over the inputs: one samples training documents for the vocabulary (none when a tokenizer is given), one
tokenizes. Everything is built in a hidden sibling of `out` that takes its name at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from skymoe.base.errors import FormatError
from skymoe.base.files import staging_directory
from skymoe.base.progress import progress
from skymoe.base.space import ensure_free_space
from skymoe.data.build import TextWriter, TokenFileReport, hash_share
from skymoe.data.config import BuildConfig
from skymoe.data.documents import DocumentReader, InputFile, list_inputs
from skymoe.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    out: Path
    train: TokenFileReport
    valid: TokenFileReport
    tokenizer_dir: Path
    vocab_size: int
    bytes_per_token: float
    files: int
    skipped: dict[str, int]
    """Reason -> documents left out."""
    notes: tuple[str, ...]
    seconds: float


def run(config: BuildConfig) -> BuildReport:
    """Build the data set that `config` describes.

    Raises:
        FormatError: an input or the tokenizer cannot be read, or there is no text.
        ConfigError: `out` exists.
        MachineError: no space, no permission. In every case nothing is left behind.
    """
    start = time.monotonic()
    files = list_inputs(config)
    ensure_free_space(config.out, sum(file.size for file in files) // 2)  # 2 bytes per token of about 4
    with staging_directory(config.out, overwrite=config.overwrite) as staging:
        tokenizer = _tokenizer(config, files)
        tokenizer.save(staging / "tokenizer")
        reader = DocumentReader(config)
        train, valid = _write(config, files, reader, tokenizer, staging)
        text_bytes, tokens = train.text_bytes + valid.text_bytes, train.tokens + valid.tokens
        report = BuildReport(
            out=config.out,
            train=train.moved(staging, config.out),
            valid=valid.moved(staging, config.out),
            tokenizer_dir=config.out / "tokenizer",
            vocab_size=tokenizer.vocab_size,
            bytes_per_token=text_bytes / tokens,
            files=len(files),
            skipped=dict(reader.skipped),
            notes=tuple(_notes(config, tokenizer, valid)),
            seconds=time.monotonic() - start,
        )
        content = {"config": config.model_dump(mode="json"), "report": asdict(report)}
        (staging / "report.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return report


def _tokenizer(config: BuildConfig, files: list[InputFile]) -> TextTokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, eos_token=config.eos_token)
    share = config.tokenizer_train_bytes / max(1, sum(file.size for file in files))
    texts = (
        text
        for text in _documents(files, DocumentReader(config), "train tokenizer")
        if not _held_out(text, config) and hash_share(text, "tokenizer", config.seed) < share
    )
    return train_tokenizer(texts, config.vocab_size)


def _write(
    config: BuildConfig, files: list[InputFile], reader: DocumentReader, tokenizer: TextTokenizer, directory: Path
) -> tuple[TokenFileReport, TokenFileReport]:
    name = config.dataset_name
    with (
        TextWriter(directory / "train", tokenizer, name) as train,
        TextWriter(directory / "valid", tokenizer, f"{name}-valid") as valid,
    ):
        for text in _documents(files, reader, "tokenize"):
            (valid if _held_out(text, config) else train).add(text)
        reports = train.finish(), valid.finish()
    if reports[0].prefix is None:
        hint = "lower validation_share" if reports[1].documents else "look at inputs, extensions, text_key"
        raise FormatError("there is no text to train on", where=", ".join(map(str, config.inputs)), hint=hint)
    return reports


def _documents(files: list[InputFile], reader: DocumentReader, description: str) -> Iterator[str]:
    """All documents in order. The bar counts bytes of the files; a packed file moves it when it ends."""
    with progress(description, total=sum(file.size for file in files) / 1e6, unit="MB") as bar:
        for file in files:
            left = file.size
            for text in reader.read(file):
                step = min(len(text), left)
                left -= step
                bar.advance(step / 1e6)
                yield text
            bar.advance(left / 1e6)


def _held_out(text: str, config: BuildConfig) -> bool:
    return hash_share(text, "validation", config.seed) < config.validation_share


def _notes(config: BuildConfig, tokenizer: TextTokenizer, valid: TokenFileReport) -> Iterator[str]:
    if config.validation_share > 0 and valid.prefix is None:
        yield "no document was held out: there are too few; raise validation_share, or text_unit: paragraph"
    if config.tokenizer is None and tokenizer.vocab_size < config.vocab_size:
        yield f"the vocabulary has {tokenizer.vocab_size} tokens, not {config.vocab_size}: no more pairs to merge"
