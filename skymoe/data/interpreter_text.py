"""Text that every Python installation carries: three domains, nothing downloaded, nothing redistributed.

    prose   the language reference that `help("...")` shows (pydoc_data.topics), and IDLE's manual and notes
    docs    docstrings of the standard library
    code    its source files, without the docstrings

Care against leaks between training and held-out text: topics quote each other (the page on `compound` statements holds
those on `if`, `for`, `with`), so a paragraph is kept once; docstrings are cut out of the code; and the docs and the
code of one file carry the same group name, by which the corpus holds them out together. Source is read and parsed,
never imported; tests, generated tables and what belongs to one machine are left out. There is no Chinese text in it.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import io
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROSE, DOCS, CODE = "prose", "docs", "code"

_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__", "lib2to3", "encodings",
    "pydoc_data", "idlelib", "turtledemo", "ensurepip",
}  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")
_IDLE_TEXTS = ("NEWS.txt", "News3.txt", "NEWS2x.txt", "News2.txt", "README.txt", "HISTORY.txt", "extend.txt")
_SECTION_CHARACTERS = 6000
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One text. Documents of one `group` are held out together."""

    group: str
    text: str


def read_interpreter_text(max_bytes_per_domain: int) -> dict[str, list[Document]]:
    """Prose, docs and code of the running Python, in a fixed order. Empty lists where it carries none."""
    library = Path(sysconfig.get_path("stdlib"))
    docs, code = _docs_and_code(library, max_bytes_per_domain)
    return {PROSE: _up_to(_prose(library), max_bytes_per_domain), DOCS: docs, CODE: code}


def _prose(library: Path) -> Iterator[Document]:
    """Sections of a few thousand characters; a paragraph appears once."""
    seen: set[str] = set()
    for name, text in _prose_texts(library):
        section: list[str] = []
        number = 0
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if not words or words in seen:
                continue
            seen.add(words)
            section.append(paragraph.strip("\n"))
            if sum(map(len, section)) >= _SECTION_CHARACTERS:
                yield Document(f"{name}#{number}", "\n\n".join(section) + "\n")
                section, number = [], number + 1
        if sum(map(len, section)) >= 200:  # what is left of a topic that others quote in full is a lone heading
            yield Document(f"{name}#{number}", "\n\n".join(section) + "\n")


def _prose_texts(library: Path) -> Iterator[tuple[str, str]]:
    """Name and text, the longest topics first: they quote the shorter ones."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # Debian's python3-minimal
        topics = {}
    yield from sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0]))
    for name in _IDLE_TEXTS:
        if (path := library / "idlelib" / name).is_file():
            yield f"idlelib/{name}", path.read_text(encoding="utf-8", errors="replace")
    if (path := library / "idlelib" / "help.html").is_file():
        yield "idlelib/help.html", _plain(path.read_text(encoding="utf-8", errors="replace"))


def _plain(page: str) -> str:
    page = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", page)
    page = re.sub(r"(?i)</(p|h\d|li|dd|dt|pre|tr)>", "\n\n", page)
    return html.unescape(re.sub(r"<[^>]*>", "", page)).replace("\u00b6", "")


def _docs_and_code(library: Path, max_bytes: int) -> tuple[list[Document], list[Document]]:
    """Files in alphabetical order until both domains are full."""
    docs: list[Document] = []
    code: list[Document] = []
    docs_bytes = code_bytes = 0
    for path in _source_files(library):
        if docs_bytes >= max_bytes and code_bytes >= max_bytes:
            break
        try:
            source = path.read_text(encoding="utf-8")
            docstrings, rest = split_docstrings(source)
        except (ValueError, SyntaxError, OSError):  # a fixture that is broken on purpose
            continue
        group = path.relative_to(library).as_posix()
        if docstrings and docs_bytes < max_bytes:
            docs.append(Document(group, "\n\n".join(docstrings) + "\n"))
            docs_bytes += len(docs[-1].text.encode())
        if rest.strip() and code_bytes < max_bytes:
            code.append(Document(group, rest))
            code_bytes += len(rest.encode())
    return docs, code


def _source_files(library: Path) -> list[Path]:
    found = []
    folders = [library]
    while folders:
        for path in folders.pop().iterdir() if library.is_dir() else ():
            if path.is_dir() and path.name not in _SKIPPED_FOLDERS and "-" not in path.name:
                folders.append(path)
            elif path.suffix == ".py" and not path.name.startswith(_SKIPPED_PREFIXES):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())


def split_docstrings(source: str) -> tuple[list[str], str]:
    """The docstrings of a module, cleaned, in order; and its source without them (it still parses).

    Raises:
        SyntaxError, ValueError: this is not Python.
    """
    lines = io.StringIO(source).readlines()  # splitlines() would also split at form feeds, which ast does not count
    found = sorted(_docstrings(ast.parse(source)), key=lambda item: item[1].lineno)
    for owner, node, _ in reversed(found):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        before, after = lines[first][: node.col_offset], lines[last - 1].encode()[node.end_col_offset :]
        if before.strip() == "" and after.strip() == b"":  # else it shares its line with code: let it stand
            lines[first:last] = [] if len(owner.body) > 1 or isinstance(owner, ast.Module) else [f"{before}pass\n"]
    return [inspect.cleandoc(text) for _, _, text in found], "".join(lines).lstrip("\n")


def _docstrings(tree: ast.Module) -> Iterator[tuple[_Documented, ast.Expr, str]]:
    """Each documented module, class and function (not those inside branches), its docstring statement and the text."""
    nodes: list[_Documented] = [tree]
    while nodes:
        node = nodes.pop()
        match node.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str(text))) as first] if text.strip():
                yield node, first, text
        nodes += [child for child in node.body if isinstance(child, _DEFINITIONS)]


def _up_to(documents: Iterator[Document], max_bytes: int) -> list[Document]:
    taken: list[Document] = []
    size = 0
    for document in documents:
        if size >= max_bytes:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken
