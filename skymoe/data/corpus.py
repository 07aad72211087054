"""The embedded corpus: three domains of real text on any machine, tokenized in a few seconds.

`build_demo_corpus` reads what the running Python carries (skymoe.data.interpreter_text), or makes text up where it
carries too little (skymoe.data.grammar; also the corpus of automatic tests, equal everywhere), holds out 5 % of each
domain, trains a byte-level BPE on the training text and writes one token file per domain and side:

    out/tokenizer/   out/train/{prose,docs,code}.{bin,idx,json}   out/valid/...   out/corpus.json

Held out are whole groups (a source file with its docstrings, a section of prose), in the order of a hash of their
names, as many as fit into the share. The standard library differs between versions of Python: losses on it compare
within one installation only, and the SHA-256 of each domain in the report says whether two corpora are the same.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from skymoe.base.errors import ConfigError
from skymoe.base.files import staging_directory
from skymoe.base.log import logger
from skymoe.base.progress import progress
from skymoe.data.build import TextWriter, TokenFileReport, hash_share
from skymoe.data.grammar import generate
from skymoe.data.interpreter_text import CODE, DOCS, PROSE, Document, read_interpreter_text
from skymoe.data.tokenizer import TextTokenizer, train_tokenizer

DOMAINS = (PROSE, DOCS, CODE)
VALIDATION_SHARE = 0.05

CorpusKind = Literal["stdlib", "synthetic"]

_ENOUGH_BYTES = {PROSE: 100_000, DOCS: 300_000, CODE: 1_000_000}
_SYNTHETIC_BYTES = 1_000_000
_TOKENIZER_BYTES = 1_000_000  # per domain


@dataclass(frozen=True)
class DomainReport:
    """One domain. `sha256` is that of all its documents in order."""

    documents: int
    text_bytes: int
    sha256: str
    train: TokenFileReport
    valid: TokenFileReport


@dataclass(frozen=True)
class DemoCorpus:
    """What was built. `train` and `valid` map the domain to the prefix of its token file."""

    kind: CorpusKind
    tokenizer_dir: Path
    train: dict[str, Path]
    valid: dict[str, Path]
    domains: dict[str, DomainReport]
    vocab_size: int
    bytes_per_token: float
    python: str
    seconds: float


def build_demo_corpus(
    out: Path,
    *,
    vocab_size: int = 2048,
    seed: int = 0,
    kind: CorpusKind = "stdlib",
    max_bytes_per_domain: int = 4_000_000,
    overwrite: bool = False,
) -> DemoCorpus:
    """Read or make the text, train the tokenizer, write the token files. `out` appears whole or not at all.

    Args:
        out: directory to create.
        vocab_size: of the tokenizer, at least 258.
        seed: which groups are held out; of the synthetic corpus also the text.
        kind: "stdlib" falls back to "synthetic", with a warning, where the interpreter has too little text.
        max_bytes_per_domain: read no more than about this much text.
        overwrite: replace `out` when it exists.

    Raises:
        ConfigError: `out` exists, or too little text is asked for.
        MissingExtraError: the package `tokenizers` is not installed.
    """
    start = time.monotonic()
    with staging_directory(out, overwrite=overwrite) as staging, progress("corpus", total=3, unit="stage") as bar:
        bar.status(now="reading")
        kind, texts = _read(kind, seed, max_bytes_per_domain)
        # Docs and code of one file share a group: together, so that no held-out code has its docs in training.
        held_out = hold_out(texts[PROSE], seed) | hold_out([*texts[DOCS], *texts[CODE]], seed)
        bar.advance(now="training the tokenizer")
        tokenizer = _train(texts, held_out, vocab_size)
        tokenizer.save(staging / "tokenizer")
        bar.advance(now="tokenizing")
        files = {name: _write(staging, name, texts[name], held_out, tokenizer) for name in DOMAINS}
        bar.advance(now="done")
        domains = {
            name: DomainReport(
                documents=len(texts[name]),
                text_bytes=_size(texts[name]),
                sha256=_digest(texts[name]),
                train=files[name][0].moved(staging, out),
                valid=files[name][1].moved(staging, out),
            )
            for name in DOMAINS
        }
        tokens = sum(train.tokens + valid.tokens for train, valid in files.values())
        corpus = DemoCorpus(
            kind=kind,
            tokenizer_dir=out / "tokenizer",
            train={name: out / "train" / name for name in DOMAINS},
            valid={name: out / "valid" / name for name in DOMAINS},
            domains=domains,
            vocab_size=tokenizer.vocab_size,
            bytes_per_token=sum(domain.text_bytes for domain in domains.values()) / tokens,
            python=platform.python_version(),
            seconds=time.monotonic() - start,
        )
        (staging / "corpus.json").write_text(json.dumps(asdict(corpus), indent=2, default=str) + "\n", encoding="utf-8")
    for name, domain in domains.items():
        megabytes = domain.text_bytes / 1e6
        logger.info("%s: %.2f MB in %d documents, sha256 %s", name, megabytes, domain.documents, domain.sha256[:16])
    return corpus


def hold_out(documents: Iterable[Document], seed: int, share: float = VALIDATION_SHARE) -> frozenset[str]:
    """Groups to hold out: in the order of a hash of their names, each that still fits into `share` of the bytes."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += len(document.text.encode())
    room = share * sum(sizes.values())
    chosen = set()
    for group in sorted(sizes, key=lambda group: hash_share(group, "hold out", seed)):
        if sizes[group] <= room:
            chosen.add(group)
            room -= sizes[group]
    return frozenset(chosen)


def _read(kind: CorpusKind, seed: int, max_bytes: int) -> tuple[CorpusKind, dict[str, list[Document]]]:
    if kind == "stdlib":
        texts = read_interpreter_text(max_bytes)
        poor = [name for name in DOMAINS if _size(texts[name]) < min(_ENOUGH_BYTES[name], max_bytes // 2)]
        if not poor:
            return "stdlib", texts
        logger.warning("this Python carries too little %s (no sources?): using synthetic text", " and ".join(poor))
    size = min(max_bytes, _SYNTHETIC_BYTES)
    return "synthetic", {
        name: [Document(f"{name}#{number}", text) for number, text in enumerate(generate(name, seed, size))]
        for name in DOMAINS
    }


def _train(texts: Mapping[str, Sequence[Document]], held_out: frozenset[str], vocab_size: int) -> TextTokenizer:
    """A vocabulary from training text only, about equally much of each domain."""
    sample: list[str] = []
    for name in DOMAINS:
        left = _TOKENIZER_BYTES
        documents = [document for document in texts[name] if document.group not in held_out]
        for document in sorted(documents, key=lambda document: hash_share(document.text, "tokenizer")):
            if left <= 0:
                break
            sample.append(document.text)
            left -= len(document.text)
    return train_tokenizer(sample, vocab_size)


def _write(
    staging: Path, name: str, documents: Sequence[Document], held_out: frozenset[str], tokenizer: TextTokenizer
) -> tuple[TokenFileReport, TokenFileReport]:
    """The token files of one domain: training, validation."""
    sides = {"train": False, "valid": True}
    reports = []
    for side, wanted in sides.items():
        (staging / side).mkdir(exist_ok=True)
        with TextWriter(staging / side / name, tokenizer, f"{name}-{side}") as writer:
            for document in documents:
                if (document.group in held_out) is wanted:
                    writer.add(document.text)
            reports.append(writer.finish())
    if any(report.prefix is None for report in reports):
        raise ConfigError(f"too little {name} to hold any out", hint="raise max_bytes_per_domain")
    return reports[0], reports[1]


def _digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode() + b"\0")
    return digest.hexdigest()


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)
