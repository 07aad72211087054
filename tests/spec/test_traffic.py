"""Bytes of dispatch: the closed forms where everything divides everything, and the paper's scale."""

from __future__ import annotations

import pytest

from skymoe.spec.layout import Coordinate, DispatchMode, ExpertAxis, Layout
from skymoe.spec.split import Split
from skymoe.spec.traffic import DispatchShape, dispatch_bytes

PAPER = DispatchShape(num_tokens=8192, hidden_size=4608, itemsize=2, num_experts=16, top_k=2)


def layout(dp: int, tp: int, expert: str, mode: str) -> Layout:
    return Layout(dp=dp, tp=tp, expert=ExpertAxis(expert), dispatch=DispatchMode(mode), stages=Split((2,)))


@pytest.mark.parametrize(
    ("dp", "tp", "expert", "mode", "megabytes"),
    [
        (32, 4, "edp", "G", 113.2),
        (32, 4, "edp", "R", 113.2),
        (32, 4, "edp", "A", 56.6),
        (4, 4, "ep", "A", 70.8),
        (16, 4, "etp", "A", 297.3),
    ],
)
def test_paper_scale(dp: int, tp: int, expert: str, mode: str, megabytes: float) -> None:
    sent = dispatch_bytes(layout(dp, tp, expert, mode), Coordinate(0, 0, 0), PAPER)
    assert sent / 1e6 == pytest.approx(megabytes, abs=0.05)


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (1, 4), (4, 1), (2, 4), (4, 2)])
def test_closed_forms(dp: int, tp: int) -> None:
    shape = DispatchShape(num_tokens=64, hidden_size=8, itemsize=4, num_experts=16, top_k=2)
    t, k, m = shape.num_tokens, shape.top_k, dp * tp
    forms = {
        ("edp", "R"): 2 * (tp - 1) / tp * t,
        ("ep", "R"): 2 * (dp - 1) * t + 2 * (tp - 1) / tp * t,
        ("etp", "R"): 2 * (dp - 1) * t + 2 * (tp - 1) / tp * t,
        ("edp", "G"): 2 * (tp - 1) / tp * t,
        ("ep", "G"): 2 * (m - 1) / m * dp * t,
        ("etp", "G"): 2 * (m - 1) / m * dp * t,
        ("edp", "A"): 2 * k * (tp - 1) / tp**2 * t,
        ("ep", "A"): 2 * k * (m - 1) / m * t / tp,
        ("etp", "A"): 2 * k * (dp - 1) / dp * t / tp + 2 * k * (tp - 1) / tp * t,
    }
    for (expert, mode), rows in forms.items():
        for place in (Coordinate(0, 0, 0), Coordinate(0, dp - 1, tp - 1)):
            assert dispatch_bytes(layout(dp, tp, expert, mode), place, shape) == pytest.approx(rows * 8 * 4)


def test_nothing_is_sent_twice_and_nothing_to_oneself() -> None:
    """Uneven parts: over all ranks, an all-gather sends each row to every other rank, a reduce-scatter likewise."""
    shape = DispatchShape(num_tokens=7, hidden_size=3, itemsize=2, num_experts=5, top_k=1)
    gathered = [dispatch_bytes(layout(1, 3, "edp", "G"), Coordinate(0, 0, tp), shape) for tp in range(3)]
    assert sum(gathered) == 2 * 2 * 7 * 3 * 2
    assert gathered[0] == (2 * 3 + 4) * 6 and gathered[1] == gathered[2] == (2 * 2 + 5) * 6


def test_loads_count_only_what_leaves() -> None:
    """Five experts on two ranks (3 and 2): rank 0 sends its 4 rows for rank 1's experts, and 6 rows back to it."""
    shape = DispatchShape(num_tokens=9, hidden_size=2, itemsize=8, num_experts=5, top_k=2)
    loads = [[3, 2, 1, 4, 0], [1, 2, 3, 0, 2]]
    row = 2 * 8
    assert dispatch_bytes(layout(1, 2, "edp", "A"), Coordinate(0, 0, 0), shape, loads) == (4 + 6) * row
    assert dispatch_bytes(layout(1, 2, "edp", "A"), Coordinate(0, 0, 1), shape, loads) == (6 + 4) * row
    assert dispatch_bytes(layout(2, 1, "ep", "A"), Coordinate(0, 1, 0), shape, loads) == (6 + 4) * row
    cut = dispatch_bytes(layout(1, 2, "etp", "A"), Coordinate(0, 0, 0), shape, loads)
    assert cut == (10 + 8) * row  # one replica: nothing but the gather of 10 rows, and 8 partial rows to the other
