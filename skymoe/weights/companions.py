"""The files that travel with a model and are no weights: tokenizer, chat templates, licence. Byte for byte.

A tokenizer that is off by one space changes every token, and a licence must arrive as it was given; so these files are
copied, never rewritten. Only files of known names and kinds are looked at, each of bounded size. A link may not lead
out of the directory, and what is no regular file (a pipe would never end) is an error. Left out on purpose: Python
files, which a tokenizer of old models may need; code from a model directory is neither run nor passed on. No torch.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from skymoe.base.errors import FormatError
from skymoe.base.files import write_atomic
from skymoe.base.inside import read_inside

GENERATION_NAME = "generation_config.json"
PROVENANCE_NAME = "skymoe.json"  # where a model that we wrote comes from
_TOKENIZER_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATE_DIRECTORY = "additional_chat_templates"  # as transformers writes the templates beside the main one
_TEMPLATE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}\.jinja")
_TIKTOKEN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}\.tiktoken")
_LICENCE = re.compile(
    r"(.{0,60}[ _-])?(licen[sc]e|notices?|copying|use[ _-]policy|acceptable[ _-]use)([ _-][\w +-]{0,60}(\.\d+)*)?"
    r"(\.(txt|md|rst|pdf))?",
    re.IGNORECASE,
)
_MAX_NAME = 120
_MAX_ENTRIES, _MAX_FILES = 20_000, 64  # in a directory; of one kind
_MIB = 2**20
_MAX_TOKENIZER_BYTES, _MAX_SMALL_BYTES = 256 * _MIB, 16 * _MIB


def tokenizer_names(directory: Path) -> tuple[str, ...]:
    """The tokenizer and template files in `directory`, as paths relative to it. Raises FormatError."""
    own = [name for name in _TOKENIZER_NAMES if os.path.lexists(directory / name)]
    own += [name for name in _entries(directory) if _TIKTOKEN.fullmatch(name)]
    templates = directory / _TEMPLATE_DIRECTORY
    if os.path.lexists(templates):
        if not stat.S_ISDIR(os.lstat(templates).st_mode):
            raise FormatError("this must be a directory, not a link or a file", where=templates)
        own += [f"{_TEMPLATE_DIRECTORY}/{name}" for name in _entries(templates) if _TEMPLATE.fullmatch(name)]
    return _bounded(own, directory)


def licence_names(directory: Path) -> tuple[str, ...]:
    """The files in `directory` that say under which terms it may be used, by their names. Raises FormatError."""
    return _bounded([name for name in _entries(directory) if _LICENCE.fullmatch(name)], directory)


def read_companion(directory: Path, name: str) -> bytes:
    """The content of one of the files that the functions above named.

    Raises:
        FormatError: a link that leads out or nowhere, no regular file, or too large for its kind.
    """
    small = name.endswith((".jinja", GENERATION_NAME)) or _LICENCE.fullmatch(name) is not None
    limit = _MAX_SMALL_BYTES if small else _MAX_TOKENIZER_BYTES
    folder, _, base = name.rpartition("/")
    # A template that is a link lies in the cache, beside the snapshot; `inside` knows that place from the top only.
    if folder and not (directory / name).is_symlink():
        content = read_inside(directory / folder, base, max_bytes=limit)
    else:
        content = read_inside(directory, name, max_bytes=limit)
    if content is None:
        raise FormatError("there is no such file", where=directory / name)
    return content


def copy_tokenizer(source: Path, directory: Path) -> tuple[str, ...]:
    """Copy tokenizer and templates; the names of what was copied. Raises FormatError, MachineError."""
    names = tokenizer_names(source)
    write_companions(directory, {name: read_companion(source, name) for name in names})
    return names


def write_companions(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by their relative names. Raises MachineError."""
    for name, content in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        write_atomic(directory / name, content)


def _entries(directory: Path) -> Iterator[str]:
    """Names in `directory`, in order; those that cannot be shown or are very long are not among them."""
    try:
        with os.scandir(directory) as found:
            names = [entry.name for entry in islice(found, _MAX_ENTRIES + 1)]
    except FileNotFoundError:
        return iter(())  # a tokenizer's directory may vanish during a long training
    except OSError as error:
        raise FormatError(f"the directory cannot be read: {error.strerror}", where=directory) from error
    if len(names) > _MAX_ENTRIES:
        raise FormatError(f"more than {_MAX_ENTRIES} files", where=directory, why="no model directory has so many")
    return (name for name in sorted(names) if len(name) <= _MAX_NAME and name.isprintable() and name[0] != ".")


def _bounded(names: list[str], directory: Path) -> tuple[str, ...]:
    if len(names) > _MAX_FILES:
        raise FormatError(
            f"{len(names)} tokenizer or licence files", where=directory, why="no honest model has so many"
        )
    return tuple(names)
