from __future__ import annotations

import ast
import hashlib

import pytest

from skymoe.data.grammar import generate


@pytest.mark.parametrize(
    ("domain", "digest"), [("prose", "dccd7afbf5648155"), ("docs", "1fd0093a01b5eda3"), ("code", "cf638c6a6bb5eb81")]
)
def test_the_text_is_the_same_on_every_machine(domain: str, digest: str) -> None:
    assert hashlib.sha256("".join(generate(domain, 0, 100_000)).encode()).hexdigest()[:16] == digest


def test_code_is_python() -> None:
    for text in generate("code", 3, 60_000):
        ast.parse(text)


def test_size_and_seed() -> None:
    for domain in ("prose", "docs", "code"):
        texts = generate(domain, 1, 50_000)
        assert sum(map(len, texts)) >= 50_000 > sum(map(len, texts[:-1]))
        assert texts != generate(domain, 2, 50_000) and all(text.isascii() for text in texts)
