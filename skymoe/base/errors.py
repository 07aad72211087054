"""The failures a user can cause, and how each one is told.

Every message answers four questions: *what* is wrong, *where*, *why* it is refused, and *what to do next*. The command
line prints the message without a traceback and exits with `exit_code`. Anything else that is raised is our own defect
and keeps its traceback.

Exit codes: 0 done, 1 the job ran and its answer is "no" (verification failed, files differ), 2 bad input,
3 the machine (no space, no port), 70 a defect of ours, 75 interrupted but resumable, 130 interrupted.
"""

from __future__ import annotations


def printable(text: object, limit: int = 300) -> str:
    """`text` with control characters escaped and the length bounded: names from files are hostile."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escaped if len(escaped) <= limit else escaped[:limit] + "..."


def _visible(text: str) -> str:
    """`text` without control characters; line breaks stay. The last guard: names should be `printable` before."""
    return text if text.isprintable() else "\n".join(printable(line, 10 * len(line)) for line in text.split("\n"))


class SkymoeError(ValueError):
    """A failure with an answer for the user. Whatever stands in it, no control character reaches a terminal.

    Args:
        what: one sentence, what is wrong.
        where: the file, line, key or tensor.
        why: the reason it is refused, when it is not obvious.
        hint: what to do next.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = "", why: str = "", hint: str = "") -> None:
        self.what, self.why, self.hint = _visible(what), _visible(why), _visible(hint)
        self.where = str(where)
        lines = [f"{printable(where, 2000)}: {self.what}" if where else self.what]
        lines += [f"  why: {self.why}"] if why else []
        lines += [f"  try: {self.hint}"] if hint else []
        super().__init__("\n".join(lines))


class ConfigError(SkymoeError):
    """A recipe or a command-line option that cannot be used."""


class FormatError(SkymoeError):
    """A model directory, tensor file or dataset that is missing, broken or hostile."""


class CheckpointError(SkymoeError):
    """A checkpoint generation that cannot be used; the message names the file."""


class TrainingError(SkymoeError):
    """Training cannot go on (not-a-number, repeated spikes)."""

    exit_code = 1


class MachineError(SkymoeError):
    """The machine refuses: no disk space, no permission."""

    exit_code = 3


class MissingExtraError(SkymoeError):
    """An optional dependency is needed and not installed."""

    exit_code = 3

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs a package that is not installed", hint=f'pip install "skymoe[{extra}]"')
