from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from skymoe.data.indexed import IndexedWriter
from skymoe.data.tokenizer import TextTokenizer, train_tokenizer

WriteTokens = Callable[..., Path]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """write_tokens("name", [[1, 2], [3]]) -> prefix; or the number of tokens, then documents of odd lengths."""

    def write(name: str, documents: Sequence[Sequence[int]] | int, dtype: str = "uint16") -> Path:
        if isinstance(documents, int):
            rng = np.random.default_rng(documents)
            cuts = np.cumsum(rng.integers(1, 40, documents))
            documents = np.split(np.arange(documents) % 60_000, cuts[cuts < documents])
        with IndexedWriter(tmp_path / name, dtype) as writer:
            for document in documents:
                writer.add_document(document)
            writer.finish()
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog\n", "def f(x):\n    return x + 1\n"] * 20, 300)
