"""The program of the process that renders chat templates; `chat_process` starts it. It imports nothing else of ours.

A template is a program, and Jinja's sandbox only keeps it from Python's internals: `{{ 'a' * 2**28 }}`, nested loops of
a hundred thousand or `'%999999999d' % 1` pass it. There is no list of such things that is complete, so the kernel
holds the limits: this process has little memory, can write no file, and every render is under an alarm whose
signal nobody catches. What goes over a limit ends this process; the next request gets a new one.

What comes in and out are frames: four bytes of length, most significant first, then JSON. First {"templates": {name:
source}, "tokens": [..], "nonce": "..", "seconds": .., "characters": ..}, answered by {}; then {"template": name,
"variables": {..}}, answered by {"text": ".."}; or by {"error": ".."} where the template fails.

The environment is that of transformers: trim_blocks, lstrip_blocks, loop controls, a `tojson` that escapes no HTML,
`raise_exception`, `strftime_now`, and `{% generation %}`, which stands for its body.

Special tokens in the template's own text are written as marks that no client can guess (see `chat_tokens`): `Marker`.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MEMORY_BYTES = 384 << 20
_MAX_INTEGER_BITS = 4096
# Asked of a text, not written: there a special token stays as it is, as a client would have spelled it.
_QUESTIONS = {
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "strip", "lstrip", "rstrip", "find",
    "rfind", "index", "rindex", "count", "replace", "removeprefix", "removesuffix",
}  # fmt: skip


class Marker(NodeTransformer):
    """Writes the special tokens in what a template says as marks: nonce, then the token's number in six digits."""

    def __init__(self, tokens: list[str], nonce: str) -> None:
        self._marks = {token: f"{nonce}{number:06d}" for number, token in enumerate(tokens)}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if tokens else r"(?!)")

    def marked(self, text: str) -> str:
        """`text` with marks."""
        return self._pattern.sub(lambda match: self._marks[match[0]], text)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self.marked(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return nodes.Const(self.marked(node.value), lineno=node.lineno) if isinstance(node.value, str) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _QUESTIONS:
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name == "replace" and node.node is not None:
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox; a few common ways to make something huge get a clear answer before the kernel's."""

    intercepted_binops = frozenset(["*", "**", "+"])
    max_characters = 1 << 22

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, unless the result would be huge."""
        size = {"*": _product_size, "**": _power_size, "+": _sum_size}[operator](left, right)
        if size > self.max_characters:
            raise SecurityError("an operation makes something too large")
        return super().call_binop(context, operator, left, right)


def _product_size(left: Any, right: Any) -> int:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(other, int):
            return len(one) * max(other, 0)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_INTEGER_BITS:
        return sys.maxsize
    return 0


def _power_size(left: Any, right: Any) -> int:
    large = isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_INTEGER_BITS
    return sys.maxsize if large else 0


def _sum_size(left: Any, right: Any) -> int:
    both = isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple))
    return len(left) + len(right) if both else 0


class Generation(jinja2.ext.Extension):
    """`{% generation %} .. {% endgeneration %}` marks what an assistant wrote, for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def environment(max_characters: int) -> Environment:
    """As transformers sets it up."""
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.max_characters = max_characters
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


class Renderer:
    """Templates, compiled."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._max_characters = int(setup["characters"])
        self._marker = Marker(setup["tokens"], setup["nonce"])
        made = environment(self._max_characters)
        self._templates = {
            name: made.from_string(self._marker.visit(made.parse(source)))
            for name, source in setup["templates"].items()
        }

    def render(self, request: Mapping[str, Any]) -> str:
        """The text of one conversation. The variables `.._token` are the template's own words too."""
        variables = dict(request["variables"])
        for name, value in request["special"].items():
            variables[name] = self._marker.marked(value)
        pieces, length = [], 0
        for piece in self._templates[request["template"]].generate(variables):
            length += len(piece)
            if length > self._max_characters:
                raise SecurityError(f"the text is longer than {self._max_characters} characters")
            pieces.append(piece)
        return "".join(pieces)


def _limit(seconds: float) -> None:
    """The kernel's limits. A limit that is lower already stays."""
    for kind, wanted in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with its input
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(make: Any) -> dict[str, Any]:
    try:
        return {"text": make()}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # whatever a template does wrong is its own failure, and told
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _read() -> dict[str, Any] | None:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        return None
    frame: dict[str, Any] = json.loads(sys.stdin.buffer.read(struct.unpack(">I", head)[0]))
    return frame


def _write(frame: Mapping[str, Any]) -> None:
    data = json.dumps(frame).encode()
    sys.stdout.buffer.write(struct.pack(">I", len(data)) + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Answer frames until there are no more."""
    setup = _read()
    if setup is None:
        return
    seconds = float(setup["seconds"])
    _limit(seconds)
    renderers: list[Renderer] = []
    answer = _answer(lambda: renderers.append(Renderer(setup)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write(answer)
    while renderers and (request := _read()) is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _answer(lambda request=request: renderers[0].render(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answer)


if __name__ == "__main__":
    main()
