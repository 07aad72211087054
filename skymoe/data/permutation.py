"""A shuffle of n things that takes no memory: where does position i go in epoch e?

Shuffling a billion samples by a permutation array costs 8 GB on every rank, and again each epoch. A Feistel network
computes one entry at a time instead. Write i as (left, right) on an a x b grid with a*b just above n, and add in turn a
hash of one half to the other, modulo its side:

    left  <- left  + hash(right)  mod a
    right <- right + hash(left)   mod b

Each line can be undone whatever the hash is, so the whole is a bijection of the grid. Results outside [0, n) are sent
through again (cycle walking), which makes it a bijection of [0, n); fewer than a + b of the grid's cells lie outside,
so it is rare. Six rounds mix well; this is for shuffling, not for secrets.

All arithmetic is on unsigned 64-bit integers with wrap-around, so every machine gets the same order.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1, _MUL_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix64(x: U64) -> U64:
    """The finaliser of splitmix64: a bijection of 64 bits in which every input bit moves every output bit."""
    x = (x ^ (x >> _SHIFT_1)) * _MUL_1
    x = (x ^ (x >> _SHIFT_2)) * _MUL_2
    return x ^ (x >> _SHIFT_3)


def key_of(*parts: object) -> int:
    """A 64-bit key from any printable parts, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def permute(positions: npt.NDArray[np.int64], size: int, *, key: int, epochs: npt.NDArray[np.int64]) -> U64:
    """Where each position of [0, size) goes; for a fixed key and epoch a bijection of [0, size).

    Args:
        positions: any shape, each in [0, size).
        size: how many things are shuffled, 1 to 2^62.
        key: which shuffle (`key_of`).
        epochs: of each position: every epoch has an order of its own.
    """
    if not 1 <= size <= 1 << 62:
        raise ValueError(f"cannot permute {size} things")
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    keys = mix64(np.uint64(key) + epochs.astype(np.uint64) * _GOLDEN)
    result = _feistel(positions.astype(np.uint64), keys, np.uint64(height), np.uint64(width))
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], keys[outside], np.uint64(height), np.uint64(width))
    return result


def _feistel(x: U64, keys: U64, height: np.uint64, width: np.uint64) -> U64:
    left, right = x // width, x % width
    for number in range(0, _ROUNDS, 2):
        left = (left + mix64(keys + (right + np.uint64(number << 32)) * _GOLDEN) % height) % height
        right = (right + mix64(keys + (left + np.uint64((number + 1) << 32)) * _GOLDEN) % width) % width
    return left * width + right
