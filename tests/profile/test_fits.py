"""Laws found again from points that follow them, and points that do not."""

from __future__ import annotations

import math

import pytest

from skymoe.profile.fits import fit_gemm, fit_line


def test_line() -> None:
    fit = fit_line([(x, 2e-4 + x / 5e8) for x in (4e3, 6.4e4, 1e6, 1.6e7)])
    assert fit.start == pytest.approx(2e-4) and fit.rate == pytest.approx(5e8) and fit.error < 1e-9


def test_line_weighs_small_messages_as_much_as_large_ones() -> None:
    points = [(1e3, 1.1e-4), (1e4, 1.0e-4), (1e8, 0.1)]
    fit = fit_line(points)
    assert fit.start == pytest.approx(1e-4, rel=0.1) and fit.rate == pytest.approx(1e9, rel=0.05)


@pytest.mark.parametrize("points", [[(4e3, 1e-3)], [(4e3, 1e-3), (8e3, 1e-3)], [(4e3, 2e-3), (8e3, 1e-3)]])
def test_line_of_odd_points_is_physical(points: list[tuple[float, float]]) -> None:
    fit = fit_line(points)
    assert fit.start >= 0 and 0 < fit.rate < math.inf


def test_gemm_law() -> None:
    def seconds(flops: float, size: float) -> float:
        return 5e-6 + math.hypot(flops / 8e10, size / 2e10)

    shapes = [(m, k, n) for m in (1, 64, 512) for k in (256, 2048) for n in (256, 1024)]
    costs = [(2.0 * m * k * n, 4.0 * (m * k + k * n + m * n)) for m, k, n in shapes]
    fit = fit_gemm([(*cost, seconds(*cost)) for cost in costs])
    assert fit.rate == pytest.approx(8e10, rel=0.02)
    assert fit.bandwidth == pytest.approx(2e10, rel=0.02)
    assert fit.launch_s == pytest.approx(5e-6, rel=0.1)
    assert fit.error < 0.01
