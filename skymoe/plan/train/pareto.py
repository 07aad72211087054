"""Memory against speed: the layouts that no other one beats in both.

Beside what the search found, the best layouts are divided again for less memory than there is: then more layers are run
again, and the same ranks need less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from skymoe.plan.train.figures import with_memory
from skymoe.plan.train.search import GB, Found, Refused, divide

SHARES = (0.85, 0.7, 0.55, 0.4)
"""Of the memory of the fastest layout."""


def pareto(found: Sequence[Found], *, families: int = 1) -> list[Found]:
    """The undominated, the fastest first; `families` layouts are divided for less memory as well."""
    less = [one for family in found[:families] for one in _for_less(family)]
    return undominated([*found, *less])


def undominated(found: Iterable[Found]) -> list[Found]:
    """Those for which nothing faster needs as little memory."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda one: (one.step_s, one.memory_gb)):
        if not kept or one.memory_gb < 0.995 * kept[-1].memory_gb:
            kept.append(one)
    return kept


def _for_less(found: Found) -> Iterable[Found]:
    """The same layout, divided for less and less memory, as long as it fits."""
    for share in SHARES:
        priced = with_memory(found.priced, share * found.memory_gb * GB)
        divided = divide(priced)
        if isinstance(divided, Refused):
            return
        yield divided
