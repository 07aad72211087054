"""Collectives between GPUs: alpha + factor * bytes / bandwidth, in and out of a node.

A group has n ranks, g of them in each node. NCCL's rings pass a node's boundary once per ring and use every network
card, so a gather of B bytes needs, in the node, B (n-1)/n over the node's link per GPU, and out of it B (n-g)/n over
the network links of its g members; both go on at the same time, and the slower one counts. An all-reduce is a
reduce-scatter and an all-gather. An all-to-all sends (g-1)/n of what a rank has to neighbours and (n-g)/n away.

Latency: alpha of the link once, and for groups of several nodes half the network's latency per node that a ring
passes (all-gather, reduce-scatter), or twice its latency per level of a tree (all-reduce). Left out: congestion by
other groups, and topologies other than nodes.

Work that goes on beside communication slows both down: `exposed` counts what is longer than its cover, and a share of
what is covered (1.1 to 1.3 in Galvatron's overlap coefficient; 0.15 here: SMs and memory bandwidth that NCCL takes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skymoe.plan.hardware.gpu import Cluster

INTERFERENCE = 0.15


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, `stride` apart in rank numbers."""

    cluster: Cluster
    ranks: int
    stride: int = 1

    @property
    def neighbours(self) -> int:
        """Ranks of the group in one node."""
        return self.cluster.neighbours(self.ranks, self.stride)

    def all_gather(self, size: float) -> float:
        """Seconds; `size` is that of the result, on every rank."""
        return self._ring(size) if self.ranks > 1 and size > 0 else 0.0

    def reduce_scatter(self, size: float) -> float:
        """Seconds; `size` is that of the input, on every rank."""
        return self.all_gather(size)

    def all_reduce(self, size: float) -> float:
        """Seconds; `size` bytes on every rank."""
        if self.ranks == 1 or size <= 0:
            return 0.0
        gpu = self.cluster.gpu
        levels = math.log2(math.ceil(self.ranks / self.neighbours))
        return gpu.node.latency_s + 2.0 * levels * gpu.network.latency_s + 2.0 * self._transfer(size)

    def all_to_all(self, size: float, *, copies: int = 1) -> float:
        """Seconds; `size` bytes on every rank, an equal part for each rank, its own included.

        Args:
            size: bytes.
            copies: so many equal copies of everything are among `size`, for ranks drawn evenly; what goes to several
                ranks of a node crosses the network once and is copied there (DeepEP; 1: nothing is shared).
        """
        if self.ranks == 1 or size <= 0:
            return 0.0
        gpu, near = self.cluster.gpu, self.neighbours
        nodes = self.ranks / near
        shared = copies > 1 and nodes > 1
        inside = size * (near - 1) / (near if shared else self.ranks) / gpu.node.bandwidth
        once = nodes * (1.0 - (1.0 - 1.0 / nodes) ** copies) / copies  # nodes that a token reaches, per copy
        away = once * size * (self.ranks - near) / self.ranks / gpu.network.bandwidth
        return self.latency_s + max(inside, away)

    def send(self, size: float) -> float:
        """Seconds from one rank to the next."""
        if self.ranks == 1:
            return 0.0
        link, pair = self.cluster.link(self.ranks, self.stride), self.cluster.gpu.pair
        if pair is not None and self.neighbours == self.ranks:
            link = pair
        return link.latency_s + size / link.bandwidth

    @property
    def latency_s(self) -> float:
        """Alpha of the slowest link."""
        return self.cluster.link(self.ranks, self.stride).latency_s

    def _transfer(self, size: float) -> float:
        gpu, near = self.cluster.gpu, self.neighbours
        inside = size * (self.ranks - 1) / self.ranks / gpu.node.bandwidth if near > 1 else 0.0
        away = size * (self.ranks - near) / self.ranks / (near * gpu.network.bandwidth)
        return max(inside, away)

    def _ring(self, size: float) -> float:
        gpu = self.cluster.gpu
        steps = math.ceil(self.ranks / self.neighbours) - 1
        alpha = gpu.node.latency_s if self.neighbours > 1 else gpu.network.latency_s
        return alpha + 0.5 * steps * gpu.network.latency_s + self._transfer(size)


def exposed(communication_s: float, cover_s: float) -> float:
    """What communication adds to the computation that goes on at the same time."""
    hidden = min(communication_s, cover_s)
    return communication_s - hidden + INTERFERENCE * hidden
