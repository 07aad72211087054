"""How many bytes of text each token stands for: the denominator of bits per byte, exact and without decoding.

A byte-level vocabulary writes every byte as one printable character (GPT-2's alphabet), so a token's length in
characters is its length in bytes, also when the token ends in the middle of a character. A vocabulary with byte
fallback (Llama, Mistral) writes a space as U+2581 and a lone byte as <0xAB>. Special tokens stand for no text: 0. Other
vocabularies (WordPiece, normalised text) do not give the text back; for these we refuse rather than guess.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import FormatError
from skymoe.base.strict_json import read_json_object

_MAX_BYTES = 1 << 28
_MAX_VOCAB = 1 << 24
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_byte_lengths(tokenizer: Path, *, vocab_size: int | None = None) -> npt.NDArray[np.uint16]:
    """Bytes of each token id (V,), zero for special tokens and for ids without a token.

    Args:
        tokenizer: directory with a tokenizer.json, or that file.
        vocab_size: V; default: one more than the largest id. Models often have a few rows more than the tokenizer.

    Raises:
        FormatError: no readable tokenizer.json, a vocabulary whose bytes are not known, ids outside [0, vocab_size).
    """
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    content = read_json_object(path, max_bytes=_MAX_BYTES)
    vocab, added = _vocabulary(content, path)
    byte_level = _uses(content, "ByteLevel")
    if not byte_level and not _fallback(content):
        raise FormatError("the bytes of this vocabulary are not known", where=path, why="it is not byte-level")
    lengths = {number: (len(token) if byte_level else _fallback_length(token)) for token, number in vocab.items()}
    lengths |= {number: 0 if special else len(text.encode()) for number, (text, special) in added.items()}
    size = vocab_size if vocab_size is not None else max(lengths, default=-1) + 1
    if any(not 0 <= number < min(size, _MAX_VOCAB) for number in lengths):
        raise FormatError(f"the tokenizer has ids outside the vocabulary of {size}", where=path)
    result = np.zeros(size, np.uint16)
    result[list(lengths)] = np.minimum(list(lengths.values()), np.iinfo(np.uint16).max)
    return result


def _vocabulary(content: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[int, tuple[str, bool]]]:
    """Token -> id of the model, and id -> (text, special) of the tokens added to it."""
    model, added = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        if not isinstance(vocab, dict) or any(type(number) is not int for number in vocab.values()):
            raise TypeError
        extra = {int(token["id"]): (str(token["content"]), bool(token["special"])) for token in added}
    except (TypeError, KeyError, ValueError) as error:
        raise FormatError("no vocabulary that maps tokens to ids", where=path) from error
    return vocab, extra


def _uses(content: dict[str, Any], kind: str) -> bool:
    """Whether the pre-tokenizer or the decoder is, or contains, a step of this type."""
    steps = [content.get("pre_tokenizer"), content.get("decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            if step.get("type") == kind:
                return True
            steps += [member for key in ("pretokenizers", "decoders") for member in step.get(key) or []]
    return False


def _fallback(content: dict[str, Any]) -> bool:
    return isinstance(content["model"], dict) and content["model"].get("byte_fallback") is True


def _fallback_length(token: str) -> int:
    return 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("\u2581", " ").encode())


def token_bytes(content: dict[str, Any], where: Path | str) -> dict[int, bytes]:
    """The bytes each token id stands for; added tokens, special or not, as their text.

    Args:
        content: of a tokenizer.json.
        where: named in errors.

    Raises:
        FormatError: a vocabulary whose bytes are not known.
    """
    vocab, added = _vocabulary(content, Path(where))
    if _uses(content, "ByteLevel"):
        alphabet = _byte_alphabet()
        found = {number: _byte_level(token, alphabet) for token, number in vocab.items()}
    elif _fallback(content):
        found = {number: _fallback_bytes(token) for token, number in vocab.items()}
    else:
        raise FormatError("the bytes of this vocabulary are not known", where=where, why="it is not byte-level")
    return found | {number: text.encode("utf-8", "replace") for number, (text, _) in added.items()}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte: itself where it has one, else the next from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    """As the library decodes: a token with a character outside the alphabet stands for its own text."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode("utf-8", "replace")


def _fallback_bytes(token: str) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8", "replace")
