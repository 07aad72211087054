from __future__ import annotations

import ast

import pytest

from skymoe.data.interpreter_text import CODE, DOCS, PROSE, read_interpreter_text, split_docstrings

SOURCE = '''"""Module."""
import os  # kept

class A:
    """Class
    doc."""

    def only(self):
        "Nothing else."

    def one(self): "same line"; return 1

    async def two(self):
        r"""Two."""
        x = """not a docstring"""
        return x
\x0c
def three():
    """Three."""  # comment
    return 3
'''


def test_docstrings_are_taken_out_and_the_rest_still_parses() -> None:
    docstrings, rest = split_docstrings(SOURCE)
    assert docstrings == ["Module.", "Class\ndoc.", "Nothing else.", "same line", "Two.", "Three."]
    ast.parse(rest)
    assert "Module" not in rest and "Class" not in rest and "Two" not in rest and "pass" in rest
    assert "# kept" in rest and "not a docstring" in rest
    assert "# comment" in rest  # shares its line with a comment: stays


def test_what_is_no_python_is_refused() -> None:
    for wrong in ("def", "x = \x00"):
        with pytest.raises((SyntaxError, ValueError)):
            split_docstrings(wrong)


def test_this_interpreter() -> None:
    texts = read_interpreter_text(300_000)
    if not texts[CODE]:
        pytest.skip("this Python carries no sources")
    for documents in texts.values():
        assert sum(len(document.text) for document in documents) > 100_000
    for document in texts[CODE]:
        ast.parse(document.text)
    assert texts[CODE] == read_interpreter_text(300_000)[CODE]
    assert not any("test" in document.group.split("/") for document in texts[CODE] + texts[DOCS])
    paragraphs = [" ".join(p.split()) for d in texts[PROSE] for p in d.text.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs))
