"""The same bits on any machine: golden hashes, the distribution, and the inverse normal against two other ways."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from skymoe.ops.reproducible import choice, inverse_normal, mean_and_std, normal, permutation, uniform


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# Made once, on x86-64 with AVX-512, numpy 2.4. Another machine, another numpy: the same.
GOLDEN = {
    "normal": "e9c337053cf07ea8790ae6042cf5dd9df00c6d030ae2d9816a9e4cabb26289fe",
    "shifted": "9a52b7633d856c7aee09809d813a9f16c605e19f032f5bc55cebd1aa305d5914",
    "uniform": "f58b8bda222ab9924e0d28568aee19af462b1e509fdf7d651c53f7f677b9beb0",
    "permutation": "6d371ebb037537130cb7ce49d52da967fc4f00a7af0237a2e663f17a73631d64",
    "choice": "80c73e17daaf69185b9b3bbf6eedaf131836fb70b82358f0becb85e7f077e5ae",
    "moments": "23d95e6fb0113b23393fe9010ef248eece00d7aea331cf1dd7aa336998d8f8e1",
}


def test_the_bits_are_the_same_on_every_machine():
    values = normal((301, 1009), 1.0, "0/layers.3.moe.router.weight")
    mean, std = mean_and_std(values)
    made = {
        "normal": sha256(values),
        "shifted": sha256(normal((7, 13), 0.02, "golden", mean=-0.001)),
        "uniform": sha256(uniform((5, 11), 0.5, "golden")),
        "permutation": sha256(permutation(70_001, "golden")),
        "choice": sha256(choice(1000, 499, "golden")),
        "moments": hashlib.sha256(f"{mean.hex()} {std.hex()}".encode()).hexdigest(),
    }
    assert made == GOLDEN


def test_neither_threads_nor_what_comes_after_change_a_value():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = normal((500_003,), 1.0, "k")
        torch.set_num_threads(3)
        together = normal((500_003,), 1.0, "k")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)
    assert torch.equal(normal((100,), 1.0, "k"), alone[:100])
    assert torch.equal(normal((10, 10), 1.0, "k").view(-1), alone[:100])
    assert not torch.equal(normal((100,), 1.0, "l"), alone[:100])


def test_moments_and_tails_are_those_of_the_normal_distribution():
    z = normal((2_000_000,), 1.0, "moments").double()
    error = 1 / math.sqrt(z.numel())
    assert abs(z.mean()) < 4 * error
    assert abs(z.var() - 1) < 4 * error * math.sqrt(2)
    assert abs((z**3).mean()) < 4 * error * math.sqrt(15)
    assert abs((z**4).mean() - 3) < 4 * error * math.sqrt(96)
    for limit in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(limit / math.sqrt(2))
        assert abs((z.abs() > limit).double().mean() - share) < 4 * math.sqrt(share) * error
    assert abs((z[1:] * z[:-1]).mean()) < 4 * error
    shifted = normal((400_000,), 0.02, "m", mean=0.5)
    assert shifted.mean() == pytest.approx(0.5, abs=2e-4)
    assert shifted.std() == pytest.approx(0.02, rel=0.01)
    flat = uniform((400_000,), 3.0, "u")
    assert flat.min() >= -3 and flat.max() <= 3
    assert flat.std() == pytest.approx(math.sqrt(3), rel=0.01)
    assert flat.mean() == pytest.approx(0, abs=0.02)


def test_the_inverse_normal_against_the_standard_library():
    shares = [0.0, 1e-15, 1e-11, 1.4e-11, 1e-5, 0.0749, 0.075, 0.0751, 0.3, 0.5, 0.6, 0.925, 0.9999, 1 - 1e-12]
    shares = [(math.floor(share * 2**52) + 0.5) / 2**52 for share in shares]  # what the bits can give
    ours = inverse_normal(np.array(shares))
    for share, z in zip(shares, ours, strict=True):
        assert z == pytest.approx(NormalDist().inv_cdf(share), rel=1e-14, abs=1e-16)
        if share < 0.5:
            assert 0.5 * math.erfc(-z / math.sqrt(2)) == pytest.approx(share, rel=1e-13)


def test_permutations_and_choices():
    assert torch.equal(permutation(1000, "p").sort().values, torch.arange(1000))
    assert permutation(0, "p").numel() == 0
    chosen = choice(1000, 300, "p")
    assert torch.equal(chosen, chosen.unique())
    assert chosen.numel() == 300
    assert set(permutation(1000, "p")[:300].tolist()) == set(chosen.tolist())
    firsts = torch.stack([permutation(5, f"{i}")[0] for i in range(2000)])
    assert firsts.bincount(minlength=5).min() > 330  # 400 each, 3.9 deviations


def test_mean_and_std_of_odd_sizes_and_narrow_types():
    for shape, dtype in (((3, 7), torch.float32), ((1 << 20,), torch.bfloat16), ((1_050_001,), torch.float32)):
        values = normal(shape, 2.0, "x", mean=1.0).to(dtype)
        mean, std = mean_and_std(values)
        assert mean == pytest.approx(float(values.double().mean()), rel=1e-12)
        assert std == pytest.approx(float(values.double().std()), rel=1e-12)
    assert mean_and_std(torch.tensor([4.0])) == (4.0, 0.0)
