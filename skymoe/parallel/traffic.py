"""How many bytes this rank sent, by kind of exchange and by direction.

Counted where tensors are handed to torch.distributed (parallel/transport.py), from their sizes: rows for other ranks
only, what stays here is not traffic. Ring or direct, an all-gather of even parts sends (n - 1) / n of its result per
rank, so these are the bytes of any algorithm that wastes none; for uneven parts they are those of the direct exchange,
which is what runs on gloo. Retransmissions, headers and the padding of a backend are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What was exchanged. `metadata` is everything beside activations: counts, expert ids, router weights."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    METADATA = "metadata"


class Direction(StrEnum):
    """Of the pass. A layer that is recomputed sends its forward bytes twice."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass
class Traffic:
    """Bytes sent so far. Passed to whoever sends; add up several ranks by hand."""

    sent: dict[tuple[Kind, Direction], int] = field(default_factory=dict)

    def add(self, kind: Kind, direction: Direction, num_bytes: int) -> None:
        """Count `num_bytes` more."""
        self.sent[kind, direction] = self.sent.get((kind, direction), 0) + num_bytes

    def bytes(self, kind: Kind | None = None, direction: Direction | None = None) -> int:
        """Bytes of a kind and a direction; None takes all of them."""
        return sum(
            count
            for (one, way), count in self.sent.items()
            if (kind is None or one is kind) and (direction is None or way is direction)
        )

    def activations(self, direction: Direction) -> int:
        """Bytes of one direction without the metadata: what the formulas of spec/traffic.py give."""
        return self.bytes(None, direction) - self.bytes(Kind.METADATA, direction)

    def clear(self) -> None:
        """Begin again at zero."""
        self.sent.clear()
