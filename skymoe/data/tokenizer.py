"""Text -> token ids: a byte-level BPE trained here, or the tokenizer of an existing model.

Byte-level: every text, in any language, has tokens and comes back byte for byte; nothing is unknown. Two special tokens
come first: `<|endoftext|>` (0) closes each document, `<|pad|>` (1) is for those who must pad. Text that happens to
spell a special token is encoded as ordinary text: a document cannot end itself.

Upcycling and continued training always reuse the dense model's tokenizer; training one is for models that begin here.
The package `tokenizers` (extra `text`) does the work on all cores; TOKENIZERS_PARALLELISM=false holds it to one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import ConfigError, FormatError, MissingExtraError, printable
from skymoe.base.inside import inside, read_inside
from skymoe.base.strict_json import parse_json, read_json_object
from skymoe.data.token_bytes import token_bytes

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

_LONG = 4096  # tokens
_MAX_TOKENIZER_BYTES = 1 << 28
_MAX_CONFIG_BYTES = 1 << 24
_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the token that ends a document.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        eos_token: its text; `eos_id` its number.
        json: the content of tokenizer.json.
        source: directory it was read from, None when it was trained here.
    """

    backend: Any
    eos_token: str
    eos_id: int
    json: bytes
    source: Path | None = None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(int(number) for number in self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: `decode` leaves them out, `encode` never takes text for them."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(int(number) for number, token in added.items() if token.special)

    @cached_property
    def bytes_by_id(self) -> Mapping[int, bytes]:
        """The bytes each token stands for, special tokens as their text; empty where the vocabulary does not tell."""
        where = self.source or "tokenizer.json"
        try:
            return token_bytes(parse_json(self.json, where=where), where)
        except FormatError:  # a kind of vocabulary that cannot be taken apart; its tokens can still be decoded
            return {}

    @property
    def sha256(self) -> str:
        """Of tokenizer.json."""
        return hashlib.sha256(self.json).hexdigest()

    def encode_documents(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[npt.NDArray[Any]]:
        """The ids of each text and the end token; no other special token. All cores."""
        with _failures("this text cannot be tokenized", self.source):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype) for encoding in encodings]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a prompt, with what the tokenizer puts before it if `special` (Llama: the begin token)."""
        return list(self.encoding(text, special=special).ids)

    def encoding(self, text: str, *, special: bool = True) -> Any:
        """The same as the library's `Encoding`, without offsets: `len` and `ids`.

        A batch of one, as the library lets other threads run only while it encodes batches: a megabyte takes a second.
        """
        with _failures("this text cannot be tokenized", self.source):
            return self.backend.encode_batch_fast([text], add_special_tokens=special)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        with _failures("these tokens cannot be made text", self.source):
            if len(ids) > _LONG:  # other threads run meanwhile
                return str(self.backend.decode_batch([list(ids)], skip_special_tokens=True)[0])
            return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write a directory that `transformers.AutoTokenizer.from_pretrained` loads, as the source had it."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_bytes(self.json)
        if self.source is not None:
            for name in _TOKENIZER_FILES:
                content = read_inside(self.source, name, max_bytes=_MAX_TOKENIZER_BYTES)
                if content is not None:
                    (directory / name).write_bytes(content)
        config = directory / "tokenizer_config.json"
        if not config.exists():
            config.write_text(json.dumps(self._transformers_config(), indent=2) + "\n", encoding="utf-8")

    def _transformers_config(self) -> dict[str, object]:
        has_pad = self.backend.token_to_id(PAD) is not None
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": self.eos_token,
            "pad_token": PAD if has_pad else None,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**9,
        }


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens. The same texts in the same order give the same vocabulary.

    Raises:
        MissingExtraError: the package `tokenizers` is not installed.
    """
    if vocab_size < 258:
        raise ConfigError(f"a vocabulary of {vocab_size} cannot hold 256 bytes and 2 special tokens")
    library = _library()
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.encode_special_tokens = True
    json_bytes = backend.to_str(pretty=True).encode()
    return TextTokenizer(backend, END_OF_TEXT, backend.token_to_id(END_OF_TEXT), json_bytes)


def load_tokenizer(path: Path, *, eos_token: str | None = None) -> TextTokenizer:
    """The tokenizer in a Hugging Face directory, or a tokenizer.json.

    Args:
        path: directory or file.
        eos_token: the token that ends a document; default: the one tokenizer_config.json names.

    Raises:
        FormatError: there is no tokenizer.json, it cannot be read, or no end token is known.
        MissingExtraError: the package `tokenizers` is not installed.
    """
    directory = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FormatError(
            "there is no tokenizer.json",
            where=path,
            hint="transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one",
        )
    if path.is_dir():
        inside(path, file.name)
    content = read_json_object(
        file, max_bytes=_MAX_TOKENIZER_BYTES
    )  # regular, bounded, JSON: before the library sees it
    _check_tables(content, file)
    library = _library()
    with _failures("this is not a tokenizer", file):
        backend = library.Tokenizer.from_file(str(file))
    backend.no_padding()  # tokenizer.json may carry both; documents are neither cut nor filled up
    backend.no_truncation()
    backend.encode_special_tokens = True
    name = eos_token or _eos_from_config(directory / "tokenizer_config.json") or END_OF_TEXT
    number = backend.token_to_id(name)
    if number is None:
        raise FormatError(f"the vocabulary has no end token {printable(name)!r}", where=file, hint="give eos_token")
    return TextTokenizer(backend, name, number, file.read_bytes(), directory)


def _eos_from_config(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    inside(path.parent, path.name)
    token = read_json_object(path, max_bytes=_MAX_CONFIG_BYTES).get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _check_tables(value: Any, where: Path) -> None:
    """Refuse a normalization table that claims to be longer than it is: the library allocates what it claims (8 GB)."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_tables(item, where)
    table = value.get("precompiled_charsmap") if isinstance(value, dict) else None
    if isinstance(table, str):
        try:
            raw = base64.b64decode(table, validate=True)
        except ValueError:
            return  # the library says so too
        if len(raw) < 4 or int.from_bytes(raw[:4], "little") > len(raw) - 4:
            raise FormatError("precompiled_charsmap is cut off", where=where)


@contextmanager
def _failures(what: str, where: object) -> Iterator[None]:
    """The library raises bare `Exception`, and for a panic of its Rust code something that is none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise FormatError(f"{what}: {printable(error)}", where=where or "") from error


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("tokenizing text", "text") from error
    return tokenizers
