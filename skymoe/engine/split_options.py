"""`--split heads=5,5,4 --split weights=3,1`, read. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skymoe.base.errors import ConfigError, printable

NAMES = ("heads", "kv_heads", "ffn", "experts", "vocabulary")
_MAX_RANKS = 1024
_MAX_UNITS = 1 << 26


@dataclass(frozen=True)
class Asked:
    """What the user wants of a division.

    Attributes:
        num_ranks: tensor-parallel ranks.
        sizes: units per rank, by name; of what is not named, the shares decide.
        weights: shares of the ranks; empty for equal ones.
    """

    num_ranks: int
    sizes: Mapping[str, tuple[int, ...]]
    weights: tuple[float, ...]

    def of(self, ranks: range) -> Asked:
        """The same for some of the ranks; without sizes."""
        weights = self.weights[ranks.start : ranks.stop]
        return Asked(len(ranks), {}, weights if any(weights) else ())


def read_split(options: Sequence[str], tp: int | None) -> Asked:
    """What `--split` and `--tp` say together.

    Raises:
        ConfigError: an option is unreadable, named twice, or the numbers of ranks differ.
    """
    texts: dict[str, list[str]] = {}
    for option in options:
        name, equals, values = option.partition("=")
        name = name.strip()
        if name not in (*NAMES, "weights") or not equals:
            what = f"--split {printable(option, 80)!r} is not understood"
            raise ConfigError(what, hint=f"one of {', '.join(NAMES)}, weights, such as heads=5,5,4")
        if name in texts:
            raise ConfigError(f"--split {name} is given twice")
        texts[name] = [value.strip() for value in values.split(",")]
    counts = {f"--split {name}": len(values) for name, values in texts.items()}
    if tp is not None:
        counts["--tp"] = tp
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(f"the numbers of ranks differ: {told}")
    num_ranks = next(iter(counts.values()), 1)
    if num_ranks > _MAX_RANKS:
        raise ConfigError(f"{num_ranks} ranks are more than {_MAX_RANKS}")
    weights = tuple(_weight(value) for value in texts.pop("weights", ()))
    if weights and not any(weights):
        raise ConfigError("--split weights: all are zero")
    sizes = {name: tuple(_size(name, value) for value in values) for name, values in texts.items()}
    return Asked(num_ranks, sizes, weights)


def _size(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) <= _MAX_UNITS):
        raise ConfigError(f"--split {name}: {printable(text, 40)!r} is no whole number", hint=f"{name}=5,5,4")
    return int(text)


def _weight(text: str) -> float:
    try:
        weight = float(text) if len(text) <= 24 else math.nan
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1e9:
        raise ConfigError(f"--split weights: {printable(text, 40)!r} is no share", hint="weights=3,1")
    return weight
