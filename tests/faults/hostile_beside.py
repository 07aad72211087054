"""Hostile company of the weights: tokenizer files, licences, pickles, and what is no directory."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

from faults.hostile_configs import CANARY
from faults.hostile_tools import (
    VICTIM,
    WEIGHTS,
    Build,
    Case,
    both,
    fifo,
    folder,
    link,
    sparse,
    write,
)


def pickled(name: str) -> Build:
    """A pickle that makes a canary when it is read (protocol 0: `os.system`)."""

    def make(directory: Path) -> None:
        command = f"touch '{directory.parent / CANARY}'"
        (directory / name).write_bytes(f"cposix\nsystem\n(S{command!r}\ntR.".encode())

    return make


def only_pickle(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    pickled("pytorch_model.bin")(directory)


def pickle_as_safetensors(directory: Path) -> None:
    pickled(WEIGHTS)(directory)


def socket_file(name: str) -> Build:
    def make(directory: Path) -> None:
        here = os.getcwd()
        (directory / name).unlink()
        os.chdir(directory)  # the path of a socket is at most 108 characters
        try:
            server = socket.socket(socket.AF_UNIX)
            server.bind(name)
            server.close()
        finally:
            os.chdir(here)

    return make


def secret(name: str, refused: str = "copying") -> Case:
    return Case(link(name, f"../{VICTIM}/secret"), refused=refused, says=(name, "leads out"))


def strange_company(directory: Path) -> None:
    (directory / "\x1b[2J\x1b]0;owned\x07.txt").write_text("x")
    (directory / "deep" / "er").mkdir(parents=True)
    (directory / "deep" / "up").symlink_to("..")
    (directory / "passwd").symlink_to("/etc/passwd")
    os.mkfifo(directory / "adapter_model.safetensors")


def copied(make: Build, *says: str) -> Case:
    return Case(make, refused="copying", says=says)


def tokenizer(**parts: object) -> Build:
    """A tokenizer.json that is one, but for `parts`."""
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    whole = {"version": "1.0", "added_tokens": [], "model": model, **dict.fromkeys(names), **parts}
    return write("tokenizer.json", json.dumps(whole).encode())


BACKTRACKING = {"type": "Split", "pattern": {"Regex": "([a-z ]+)+[0-9]{5}$"}, "behavior": "Isolated", "invert": False}
TEMPLATE = [{"SpecialToken": {"id": "[X]", "type_id": 0}}]
PADDING = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
TOKENIZERS: dict[str, dict[str, object]] = {  # the library panics over most of these, and aborts over the padding
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "//////////8="}},
    "a table that is cut off": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAGFiY2Q="}},
    "a pattern without end": {"pre_tokenizer": BACKTRACKING},
    "a token nobody knows": {
        "post_processor": {"type": "TemplateProcessing", "single": TEMPLATE, "pair": [], "special_tokens": {}}
    },
    "a decoder past the end": {"decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99}},
    "padding to 10^12": {"padding": PADDING | {"pad_to_multiple_of": None}},
    "numbers past the vocabulary": {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1, "</s>": 1}, "merges": []}},
}

WILD_YAML = b"---\nlicense: !!python/object/apply:os.system ['id']\na: &a [*a, *a]\n---\n\x1b[2J\0"
NONSENSE = json.dumps({"parent": "\x1b[2J", "skymoe": {"a": [1] * 9}}).encode()
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
BESIDE = {
    **{f"{name} a link to a secret": secret(name) for name in (
        TOKENIZER, GENERATION, "tokenizer_config.json", "tokenizer.model", "chat_template.jinja",
        "special_tokens_map.json", "merges.txt",
    )},
    "tokenizer a link to /etc/passwd": copied(link(TOKENIZER, "/etc/passwd"), TOKENIZER, "leads out"),
    "tokenizer a link to /dev/zero": copied(link(TOKENIZER, "/dev/zero"), TOKENIZER, "leads out"),
    "tokenizer a link to itself": copied(link(TOKENIZER, TOKENIZER), TOKENIZER),
    "tokenizer a FIFO": copied(fifo(TOKENIZER), TOKENIZER, "regular"),
    "tokenizer a socket": copied(socket_file(TOKENIZER), TOKENIZER, "regular"),
    "tokenizer a directory": copied(folder(TOKENIZER), TOKENIZER, "regular"),
    "tokenizer of 1 TB": copied(sparse(TOKENIZER, 10**12), TOKENIZER, "larger"),
    **{f"tokenizer with {name}": Case(tokenizer(**parts), refused="none") for name, parts in TOKENIZERS.items()},
    "template of 1 TB": copied(sparse("chat_template.jinja", 10**12), "chat_template.jinja", "larger"),
    "template of code": Case(
        write("chat_template.jinja", b"{{ ''.__class__.__mro__[1] }}{% for i in range(10**9) %}{% endfor %}"),
        refused="none",
    ),
    "generation config a FIFO": copied(fifo(GENERATION), GENERATION, "regular"),
    "generation config a directory": copied(folder(GENERATION), GENERATION, "regular"),
    "generation config of 1 TB": copied(sparse(GENERATION, 10**12), GENERATION, "larger"),
    "generation config no JSON": Case(write(GENERATION, b"\xff\xfe"), refused="maybe"),
    "README a link to a secret": Case(link("README.md", f"../{VICTIM}/secret"), refused="maybe"),
    "LICENSE a link to a secret": Case(link("LICENSE", f"../{VICTIM}/secret"), refused="maybe"),
    "LICENSE a FIFO": Case(fifo("LICENSE"), refused="maybe"),
    "LICENSE a link to /dev/zero": Case(link("LICENSE", "/dev/zero"), refused="maybe"),
    "README of 1 TB": Case(sparse("README.md", 10**12), refused="maybe"),
    "README of wild YAML": Case(write("README.md", WILD_YAML), refused="maybe"),
    "skymoe.json of nonsense": Case(write("skymoe.json", NONSENSE), refused="maybe"),
    "skymoe.json a FIFO": Case(fifo("skymoe.json"), refused="maybe"),
    "a pickle beside the weights": Case(both(pickled("pytorch_model.bin"), pickled("rng_state.pth")), refused="none"),
    "a pickle instead of the weights": Case(only_pickle, says=("pickle", "pytorch_model.bin")),
    "a pickle called model.safetensors": Case(pickle_as_safetensors, says=(WEIGHTS,)),
    "strange company": Case(strange_company, refused="none"),
    "an empty directory": Case(lambda d: (shutil.rmtree(d), d.mkdir(), None)[2]),
    "a file instead of a directory": Case(lambda d: (shutil.rmtree(d), d.write_bytes(b"{}"), None)[2]),
    "a FIFO instead of a directory": Case(lambda d: (shutil.rmtree(d), os.mkfifo(d), None)[2]),
    "nothing there": Case(lambda d: shutil.rmtree(d)),
    "a link to itself instead of a directory": Case(lambda d: (shutil.rmtree(d), d.symlink_to(d.name), None)[2]),
}  # fmt: skip
