"""The exact division of indivisible units over GPUs: minimise the slowest, subject to memory.

A layer is attention and then feed-forward, with an all-reduce after each, so the slowest GPU is waited for twice:

    minimise   A + F,   A = max_g a_g s_g,   F = max_g f_g t_g
    subject to sum a_g = H,  sum f_g = N,  a_g p + f_g q <= room_g

a_g heads (or groups of them) and f_g feed-forward blocks (or experts) on GPU g, s and t the seconds of one, p and q the
bytes. The two parts share nothing but memory. Exact by nested thresholds: A and F can only be
u s_g and v t_g for whole u, v. For each A, smallest first, the smallest F that is possible is found by bisection; the
search ends at A + F_min >= best. Whether (A, F) is possible is a max-plus sum over GPUs of "with a heads there, at most
so many blocks": H x GPUs array operations. Among the fastest divisions the most even one that single moves reach is
taken.

GPUs of one kind may form one `Bin` whose remainder goes round by layer: a GPU's memory then counts the mean of its
layers, rounded up to a whole unit of one layer, while a layer still waits for ceil(a / n). Left out: GPUs that differ
in kind do not rotate among each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NONE = -(1 << 40)
_SLACK = 1.0 + 1e-12  # thresholds are products of floats


@dataclass(frozen=True, kw_only=True)
class Bin:
    """GPUs that are alike and share what they hold, or one GPU.

    Attributes:
        count: GPUs.
        attention_s, ffn_s: seconds of one unit in one layer.
        room: bytes per GPU for units.
    """

    count: int
    attention_s: float
    ffn_s: float
    room: float


@dataclass(frozen=True, kw_only=True)
class Units:
    """What is divided.

    Attributes:
        attention, ffn: how many units.
        attention_bytes, ffn_bytes: of one, all layers together.
        layers: over which a remainder goes round.
    """

    attention: int
    ffn: int
    attention_bytes: float
    ffn_bytes: float
    layers: int

    def fullest(self, units: int, count: int) -> int:
        """Units of single layers that the fullest of `count` GPUs holds, when `units` of each layer go round them."""
        return -(-units * self.layers // count)

    def used(self, attention: int, ffn: int, count: int) -> float:
        """Bytes on the fullest GPU of a bin."""
        held = self.fullest(attention, count) * self.attention_bytes + self.fullest(ffn, count) * self.ffn_bytes
        return held / self.layers


@dataclass(frozen=True)
class Division:
    """Units per bin, and the seconds of a layer's two halves."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    attention_s: float
    ffn_s: float


def minimax(total: int, seconds: Sequence[float], most: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """`total` units over GPUs: the slowest as fast as can be, then the rest as even; None if `most` forbids it.

    Each unit goes where it ends earliest, ties to the first; exact for one kind of unit.
    """
    speed = sum(1.0 / s for s in seconds)
    fair = max(0.0, (total - len(seconds)) / speed)  # nobody ends before this: a start, so that few units are placed
    sizes = [int(fair / s) for s in seconds]
    if most is not None:
        sizes = [min(size, cap) for size, cap in zip(sizes, most, strict=True)]
    for _ in range(total - sum(sizes)):
        free = [g for g in range(len(seconds)) if most is None or sizes[g] < most[g]]
        if not free:
            return None
        sizes[min(free, key=lambda g: ((sizes[g] + 1) * seconds[g], g))] += 1
    return tuple(sizes)


def divide(bins: Sequence[Bin], units: Units) -> Division | None:
    """The fastest division that fits, made as even as single moves allow; None when none fits."""
    apart = _apart(bins, units)
    if apart is not None:
        return apart
    attention = _thresholds(units.attention, [(b.count, b.attention_s) for b in bins])
    ffn = _thresholds(units.ffn, [(b.count, b.ffn_s) for b in bins])
    best: tuple[float, float] | None = None
    for a in attention:
        options = [f for f in ffn if best is None or a + f < sum(best)]
        if not options:
            break
        first = _first(options, lambda f, a=a: _reach(bins, units, a, f) is not None)  # type: ignore[misc]
        if first < len(options):
            best = (a, options[first])
    return None if best is None else _placed(bins, units, *best)


def _apart(bins: Sequence[Bin], units: Units) -> Division | None:
    """Both kinds of unit divided as if the other were not there; when that fits, nothing is faster."""
    owners = [index for index, bin_ in enumerate(bins) for _ in range(bin_.count)]
    attention, ffn = [0] * len(bins), [0] * len(bins)
    halves = ((attention, units.attention, [b.attention_s for b in bins]), (ffn, units.ffn, [b.ffn_s for b in bins]))
    for sizes, total, seconds in halves:
        dealt = minimax(total, [seconds[index] for index in owners])
        assert dealt is not None
        for index, size in zip(owners, dealt, strict=True):
            sizes[index] += size
    fits = all(units.used(a, f, b.count) <= b.room for a, f, b in zip(attention, ffn, bins, strict=True))
    return _division(bins, attention, ffn) if fits else None


def _thresholds(total: int, bins: Sequence[tuple[int, float]]) -> list[float]:
    """Values that the slowest GPU's time can have, from the smallest at which the units can be placed at all."""
    values = sorted({u * s for count, s in bins for u in range(-(-total // count) + 1)})
    enough = _first(values, lambda t: sum(count * _floor(t, s) for count, s in bins) >= total)
    return values[enough:]


def _floor(threshold: float, seconds: float) -> int:
    return int(threshold * _SLACK / seconds)


def _first(values: Sequence[float], holds: Callable[[float], bool]) -> int:
    """Index of the first value that holds; once one does, all later ones do."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(values[middle]) else (middle + 1, high)
    return low


def _most_ffn(bin_: Bin, units: Units, attention_s: float, ffn_s: float) -> NDArray[np.int64]:
    """At index a: the most feed-forward units in a bin that has a heads; negative where a is too many."""
    most = np.full(units.attention + 1, _NONE, dtype=np.int64)
    cap = bin_.count * _floor(ffn_s, bin_.ffn_s)
    for a in range(min(units.attention, bin_.count * _floor(attention_s, bin_.attention_s)) + 1):
        left = bin_.room - units.fullest(a, bin_.count) * units.attention_bytes / units.layers
        if left < 0:
            break
        held = min(int(left * units.layers / units.ffn_bytes + 1e-9), units.ffn * units.layers)
        most[a] = min(cap, held * bin_.count // units.layers, units.ffn)
    return most


def _reach(bins: Sequence[Bin], units: Units, attention_s: float, ffn_s: float) -> list[NDArray[np.int64]] | None:
    """Per number of bins, at index a: the most feed-forward units they take with a heads in all. None: not enough."""
    reach = [np.full(units.attention + 1, _NONE, dtype=np.int64)]
    reach[0][0] = 0
    cache: dict[Bin, NDArray[np.int64]] = {}
    for bin_ in bins:
        if bin_ not in cache:
            cache[bin_] = _most_ffn(bin_, units, attention_s, ffn_s)
        gain, before, after = cache[bin_], reach[-1], np.full(units.attention + 1, _NONE, dtype=np.int64)
        for a in np.flatnonzero(gain >= 0):
            np.maximum(after[a:], before[: units.attention + 1 - a] + gain[a], out=after[a:])
        reach.append(after)
    return reach if reach[-1][units.attention] >= units.ffn else None


def _placed(bins: Sequence[Bin], units: Units, attention_s: float, ffn_s: float) -> Division:
    """A division within both thresholds, evened out."""
    reach = _reach(bins, units, attention_s, ffn_s)
    assert reach is not None
    heads, blocks = units.attention, units.ffn
    attention, ffn = [0] * len(bins), [0] * len(bins)
    for index in reversed(range(len(bins))):
        gain = _most_ffn(bins[index], units, attention_s, ffn_s)
        options = [a for a in np.flatnonzero(gain >= 0) if a <= heads and reach[index][heads - a] + gain[a] >= blocks]
        a = int(options[0])
        before = int(reach[index][heads - a])
        attention[index], ffn[index] = a, max(0, blocks - before)
        heads, blocks = heads - a, blocks - ffn[index]
    _even(bins, units, attention, ffn, attention_s, is_attention=True)
    _even(bins, units, ffn, attention, ffn_s, is_attention=False)
    return _division(bins, attention, ffn)


def _division(bins: Sequence[Bin], attention: Sequence[int], ffn: Sequence[int]) -> Division:
    slow_a = max(-(-a // b.count) * b.attention_s for a, b in zip(attention, bins, strict=True))
    slow_f = max(-(-f // b.count) * b.ffn_s for f, b in zip(ffn, bins, strict=True))
    return Division(tuple(attention), tuple(ffn), slow_a, slow_f)


def _even(
    bins: Sequence[Bin], units: Units, sizes: list[int], others: Sequence[int], slowest: float, *, is_attention: bool
) -> None:
    """Move single units from slower to faster bins while memory and threshold allow and the pair becomes more even."""

    def seconds(index: int) -> float:
        return bins[index].attention_s if is_attention else bins[index].ffn_s

    def time(index: int, size: int) -> float:
        return size / bins[index].count * seconds(index)

    def fits(index: int, size: int) -> bool:
        pair = (size, others[index]) if is_attention else (others[index], size)
        if -(-size // bins[index].count) > _floor(slowest, seconds(index)):
            return False
        return units.used(*pair, bins[index].count) <= bins[index].room

    for _ in range(4 * sum(sizes) * len(bins)):
        moves = [
            (max(time(g, sizes[g]), time(to, sizes[to])) - max(time(g, sizes[g] - 1), time(to, sizes[to] + 1)), g, to)
            for g in range(len(bins)) if sizes[g]
            for to in range(len(bins)) if to != g and fits(to, sizes[to] + 1)
        ]  # fmt: skip
        gain, source, target = max(moves, key=lambda move: (move[0], -move[2], move[1]), default=(0.0, 0, 0))
        if gain <= 1e-15:
            break
        sizes[source] -= 1
        sizes[target] += 1
    if len(set(bins)) < len(bins):
        _order(bins, sizes, others)


def _order(bins: Sequence[Bin], sizes: list[int], others: Sequence[int]) -> None:
    """Among equal bins that hold equally much of the other kind, the first have more."""
    for key in {(bin_, other) for bin_, other in zip(bins, others, strict=True)}:
        same = [i for i in range(len(bins)) if (bins[i], others[i]) == key]
        for index, size in zip(same, sorted((sizes[i] for i in same), reverse=True), strict=True):
            sizes[index] = size
