"""Where a model directory keeps its chat template. No torch.

`chat_template.jinja`, beside which `additional_chat_templates/` may hold others; else `chat_template` of
tokenizer_config.json, one text or a list of named ones. Each at most 64 KiB. Nothing else is ever read as a template.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from skymoe.base.errors import FormatError
from skymoe.base.inside import inside, read_inside
from skymoe.base.strict_json import read_json_object

MAX_TEMPLATE_BYTES = 1 << 16
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FILE, _CONFIG, _FOLDER = "chat_template.jinja", "tokenizer_config.json", "additional_chat_templates"
_MAX_CONFIG_BYTES = 1 << 24
_MAX_TEMPLATES = 16
_NO_TEMPLATE = "this model has no chat template, so it cannot be given a conversation"
_HINT = "use its plain completions, or put the chat_template.jinja of the model it was made from into its directory"


class NoTemplateError(FormatError):
    """The model directory has no chat template."""


def find_templates(directory: Path) -> tuple[dict[str, str], Path]:
    """The templates of a model directory by name, one of them "default", and their file. Raises FormatError."""
    data = read_inside(directory, _FILE, max_bytes=MAX_TEMPLATE_BYTES)
    if data is not None:
        return {**_additional(directory), "default": _text(data, directory / _FILE)}, directory / _FILE
    where = directory / _CONFIG
    found = _config(directory).get("chat_template")
    if isinstance(found, str):
        found = [{"name": "default", "template": found}]
    if found is None:
        raise NoTemplateError(_NO_TEMPLATE, where=directory, hint=_HINT)
    sources: dict[str, str] = {}
    for each in found if isinstance(found, list) else [None]:
        name, source = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str) or len(sources) == _MAX_TEMPLATES:
            raise FormatError("chat_template is neither a text nor a list of named ones", where=where)
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise FormatError(f"a chat template of more than {MAX_TEMPLATE_BYTES} bytes", where=where)
        sources[name] = source
    if "default" not in sources:
        raise FormatError("no chat template is called default", where=where, why=f"there are {sorted(sources)}")
    return sources, where


def _additional(directory: Path) -> dict[str, str]:
    """Those that transformers keeps beside `chat_template.jinja`."""
    folder = directory / _FOLDER
    if not folder.is_dir():
        return {}
    inside(directory, _FOLDER)
    names = sorted(path.name for path in folder.glob("*.jinja"))[:_MAX_TEMPLATES]
    found = {name: read_inside(folder, name, max_bytes=MAX_TEMPLATE_BYTES) for name in names}
    return {name.removesuffix(".jinja"): _text(data or b"", folder / name) for name, data in found.items()}


def _text(data: bytes, where: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"this is not UTF-8 (byte {error.start})", where=where) from error


def _config(directory: Path) -> dict[str, Any]:
    if not os.path.lexists(directory / _CONFIG):
        return {}
    inside(directory, _CONFIG)
    return read_json_object(directory / _CONFIG, max_bytes=_MAX_CONFIG_BYTES)


def special_tokens(directory: Path) -> dict[str, str]:
    """Names that a template may use, and their texts."""
    config = _config(directory)
    found = {
        name: token.get("content") if isinstance(token := config.get(name), dict) else token for name in SPECIAL_TOKENS
    }
    return {name: text for name, text in found.items() if isinstance(text, str)}
