from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from skymoe.base.errors import FormatError
from skymoe.data.token_bytes import token_byte_lengths
from skymoe.data.tokenizer import TextTokenizer


def write(path: Path, model: dict[str, object], added: list[dict[str, object]], **parts: object) -> Path:
    path.write_text(json.dumps({"model": model, "added_tokens": added, **parts}))
    return path


def test_special_tokens_stand_for_no_text(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path)
    lengths = token_byte_lengths(tmp_path)
    assert lengths.dtype == np.uint16 and len(lengths) == tokenizer.vocab_size
    assert lengths[:2].tolist() == [0, 0] and (lengths[2:258] == 1).all() and lengths[258:].min() >= 2
    wide = token_byte_lengths(tmp_path, vocab_size=512)
    assert len(wide) == 512 and (wide[tokenizer.vocab_size :] == 0).all()
    with pytest.raises(FormatError, match="outside the vocabulary of 100"):
        token_byte_lengths(tmp_path, vocab_size=100)


def test_byte_fallback_vocabularies(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "\u2581the": 3, "\u4e2d": 4, "\u2581\u2581": 5, "ab": 6}
    added = [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True},
             {"id": 8, "content": "\u00e9x", "special": False}]  # fmt: skip
    path = write(tmp_path / "t.json", {"vocab": vocab, "byte_fallback": True}, added)
    assert token_byte_lengths(path).tolist() == [0, 0, 1, 4, 3, 2, 2, 0, 3]


def test_byte_level_inside_a_sequence(tmp_path: Path) -> None:
    parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}}
    path = write(tmp_path / "t.json", {"vocab": {"\u0120a": 0, "\u00c3": 1}}, [], **parts)
    assert token_byte_lengths(path).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("model", "added", "message"),
    [
        ({"vocab": {"##ing": 0}}, [], "not known"),
        ({"vocab": [["a", -1.0]], "byte_fallback": True}, [], "no vocabulary"),
        ({"vocab": {"a": "0"}, "byte_fallback": True}, [], "no vocabulary"),
        ({"vocab": {"a": -1}, "byte_fallback": True}, [], "outside"),
        ({"vocab": {"a": 2**40}, "byte_fallback": True}, [], "outside"),
        ({"vocab": {"a": 0}, "byte_fallback": True}, [{"id": "x"}], "no vocabulary"),
        ({"vocab": {"a": 0}, "byte_fallback": True}, 7, "no vocabulary"),
    ],
)
def test_other_vocabularies_are_refused(tmp_path: Path, model, added, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        token_byte_lengths(write(tmp_path / "t.json", model, added))
