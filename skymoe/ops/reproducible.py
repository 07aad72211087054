"""Random values that are the same on any machine, on any number of threads, for ever.

`torch.normal_` promises nothing across versions, devices and vector widths. A conversion whose seed is written in the
model card must come out bit for bit when somebody repeats it elsewhere, so it draws here:

    key   two 64-bit words: SHA-256 of a text such as "seed/parameter/expert"
    bits  Philox4x64-10 of that key (numpy guarantees its raw stream), 64 bits per value, counted by position
    u     (bits >> 12) + 1/2, over 2^52: strictly between 0 and 1
    z     the inverse normal distribution of u, algorithm AS 241 (PPND16, Wichura 1988), relative error about 1e-16

Everything after the bits is +, -, *, / and sqrt in fp64, one array operation at a time: IEEE 754 defines each result to
the last bit, and no compiler can fuse two of them. The logarithm of the tails is not defined so, hence our own. Values
come in blocks that fit a core's cache; a block depends on the key and its number alone, so blocks are made in parallel.
About 60 million normals a second on one core of a server of 2024, 80 million on two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
_BLOCK = 1 << 16  # values: half a MiB per array
_LANES = 1 << 14  # of a sum: part of the definition. So few that torch starts no threads for them
_DRAWS_PER_COUNT = 4  # Philox4x64 makes four words of each value of its counter


def normal(shape: tuple[int, ...], std: float, key: str, *, mean: float = 0.0) -> Tensor:
    """An fp32 tensor of independent N(mean, std^2) values; they depend on `key` and the position only."""

    def block(uniform: Floats) -> Floats:
        values = inverse_normal(uniform)
        values *= std
        values += mean
        return values

    return _fill(shape, key, block)


def uniform(shape: tuple[int, ...], bound: float, key: str) -> Tensor:
    """An fp32 tensor of independent values between -bound and bound."""

    def block(uniform: Floats) -> Floats:
        uniform *= 2.0
        uniform -= 1.0
        uniform *= bound
        return uniform

    return _fill(shape, key, block)


def permutation(n: int, key: str) -> Tensor:
    """0 ... n-1 in random order, int64."""
    return torch.from_numpy(np.argsort(_bits(key, 0, n), kind="stable"))


def choice(n: int, count: int, key: str) -> Tensor:
    """`count` different numbers out of 0 ... n-1, ascending, int64."""
    return permutation(n, key)[:count].sort().values


def mean_and_std(values: Tensor) -> tuple[float, float]:
    """Mean and unbiased deviation (0 for one value) of all of `values`: fp64 sums in a fixed order.

    Lane i of 16384 adds up the values i, i + 16384, ..., and the lanes are folded in half until one is left. Relative
    to the first value, so that a mean far from 0 costs no digits.
    """
    flat, count = values.detach().contiguous().view(-1), values.numel()
    first = float(flat[0])
    sums, squares, lane = (torch.zeros(_LANES, dtype=torch.float64) for _ in range(3))
    for chunk in flat.split(_LANES):
        part = lane[: chunk.numel()]
        part.copy_(chunk).sub_(first)
        sums[: chunk.numel()].add_(part)
        squares[: chunk.numel()].add_(part.mul_(part))
    total = _folded(sums)
    variance = max(_folded(squares) - total * total / count, 0.0) / max(count - 1, 1)
    return first + total / count, math.sqrt(variance)


def _folded(lanes: Tensor) -> float:
    while lanes.numel() > 1:
        half = lanes.numel() // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes)


def _fill(shape: tuple[int, ...], key: str, transform: Callable[[Floats], Floats]) -> Tensor:
    """An fp32 tensor of `transform` of the uniform values of `key`, in blocks on torch's number of threads."""
    out = np.empty(math.prod(shape), dtype=np.float32)

    def fill(first: int) -> None:
        part = out[first : first + _BLOCK]
        part[:] = transform(_uniform(_bits(key, first, part.size)))

    starts, threads = range(0, out.size, _BLOCK), torch.get_num_threads()
    if threads == 1 or len(starts) < 4:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, starts))
    return torch.from_numpy(out.reshape(shape))


def _bits(key: str, first: int, count: int) -> npt.NDArray[np.uint64]:
    """64 random bits for each of the positions from `first` (a multiple of 4) on."""
    digest = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=digest.astype(np.uint64), counter=first // _DRAWS_PER_COUNT).random_raw(count)


def _uniform(bits: npt.NDArray[np.uint64]) -> Floats:
    """(k + 1/2) / 2^52 for the 52 upper bits k, exactly: never 0, never 1."""
    bits >>= np.uint64(12)  # with 53 bits, adding a half would round
    values = bits.astype(np.float64)
    values += 0.5
    values *= 2.0**-52
    return values


# ---- the inverse of the normal distribution function: AS 241, PPND16

_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip
_Rational = tuple[tuple[float, ...], tuple[float, ...]]


def inverse_normal(uniform: Floats) -> Floats:
    """The z below which a standard normal value lies with probability `uniform`, each strictly between 0 and 1."""
    q = uniform - 0.5
    r = q * q
    np.subtract(0.180625, r, out=r)
    values = _rational(_CENTRE, r)
    values *= q
    tails = np.flatnonzero(r < 0.0)  # |q| > 0.425: three of twenty
    if tails.size:
        q_tail = q[tails]
        p = 0.5 - np.abs(q_tail)  # exact: the distance to 0 or 1
        values[tails] = np.copysign(_tail(p), q_tail)
    return values


def _tail(p: Floats) -> Floats:
    r = np.sqrt(-_log(p))
    values = _rational(_TAIL, r - 1.6)
    far = np.flatnonzero(r > 5.0)
    if far.size:
        values[far] = _rational(_FAR_TAIL, r[far] - 5.0)
    return values


def _rational(coefficients: _Rational, x: Floats) -> Floats:
    """A quotient of two polynomials, highest power first (Horner's scheme in place)."""
    above, below = (_polynomial(row, x) for row in coefficients)
    above /= below
    return above


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value += coefficient
        value *= x
    value += coefficients[-1]
    return value


_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # high: 32 bits, times e is exact
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(10, -1, -1))


def _log(x: Floats) -> Floats:
    """Natural logarithm: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m-1)/(m+1)) as a series."""
    m, e = np.frexp(x)
    small = m < math.sqrt(0.5)
    m[small] *= 2.0
    exponent = (e - small).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(_ATANH, s * s)
    series *= 2.0
    series *= s
    series += exponent * _LN2_LOW
    series += exponent * _LN2_HIGH
    return series
