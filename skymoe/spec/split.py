"""Split: N indivisible units in contiguous parts over R ranks, sizes free.

Heads over tensor-parallel ranks [5,5,5,5,4,4,4,4], layers over pipeline stages [5,5,5,5,4], experts over
expert-parallel ranks, FFN blocks over unequal GPUs: every division in the project is a Split. The non-uniform case is
the normal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from skymoe.base.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """Sizes of the contiguous parts, one per rank. A part may be empty."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in self.sizes):
            raise ConfigError(f"a split needs one non-negative integer per rank, got {list(self.sizes)}")

    @classmethod
    def even(cls, num_units: int, num_ranks: int) -> Split:
        """Equal parts. Raises ConfigError when `num_ranks` does not divide `num_units`."""
        if num_ranks < 1 or num_units % num_ranks:
            raise ConfigError(
                f"{num_units} units do not divide evenly over {num_ranks} ranks", hint="use Split.remainder_first"
            )
        return cls((num_units // num_ranks,) * num_ranks)

    @classmethod
    def remainder_first(cls, num_units: int, num_ranks: int) -> Split:
        """As even as possible; the first ranks take the remainder: 36 over 8 is [5,5,5,5,4,4,4,4]."""
        if num_ranks < 1 or num_units < 0:
            raise ConfigError(f"cannot split {num_units} units over {num_ranks} ranks")
        share, rest = divmod(num_units, num_ranks)
        return cls(tuple(share + (rank < rest) for rank in range(num_ranks)))

    @classmethod
    def weighted(cls, num_units: int, weights: Sequence[float]) -> Split:
        """Parts in proportion to `weights` by largest remainder (ties to the lower rank)."""
        total = sum(weights)
        if not weights or total <= 0 or any(not 0 <= w < float("inf") for w in weights):
            raise ConfigError(f"split weights must be finite, non-negative and not all zero, got {list(weights)}")
        shares = [num_units * w / total for w in weights]
        sizes = [int(share) for share in shares]
        order = sorted(range(len(weights)), key=lambda rank: (sizes[rank] - shares[rank], rank))
        for rank in order[: num_units - sum(sizes)]:
            sizes[rank] += 1
        return cls(tuple(sizes))

    @property
    def num_units(self) -> int:
        """How many units there are in all."""
        return sum(self.sizes)

    @property
    def num_ranks(self) -> int:
        """How many parts there are."""
        return len(self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether all parts have the same size."""
        return len(set(self.sizes)) == 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """First unit of each part."""
        return (0, *accumulate(self.sizes[:-1]))

    def part(self, rank: int) -> range:
        """The units that `rank` owns."""
        start = self.offsets[rank]
        return range(start, start + self.sizes[rank])

    def owner(self, unit: int) -> int:
        """The rank that owns `unit`. Raises IndexError outside [0, num_units)."""
        if not 0 <= unit < self.num_units:
            raise IndexError(f"unit {unit} is outside a split of {self.num_units}")
        return next(rank for rank in range(self.num_ranks) if unit in self.part(rank))

    def scaled(self, block: int) -> Split:
        """The same split counted in finer units, `block` of them per unit (heads to columns)."""
        return Split(tuple(size * block for size in self.sizes))

    def __iter__(self) -> Iterator[range]:
        return (self.part(rank) for rank in range(self.num_ranks))
