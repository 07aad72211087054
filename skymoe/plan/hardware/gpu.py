"""Gpu, Link, Cluster: a machine as the planner sees it. The catalogue is data (`gpus.yaml`); a measured profile
overrides it. Units: bytes, seconds, FLOP/s; GB are 10^9 bytes, GiB 2^30.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """In which format matrices are multiplied."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    NVFP4 = "nvfp4"

    @property
    def weight_bytes(self) -> float:
        """Of a stored element, scales left out."""
        return {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "nvfp4": 0.5}[self.value]


_WIDER = {
    Precision.FP32: (Precision.FP32,),
    Precision.BF16: (Precision.BF16, Precision.FP32),
    Precision.FP8: (Precision.FP8, Precision.BF16, Precision.FP32),
    Precision.INT8: (Precision.INT8, Precision.FP8, Precision.BF16, Precision.FP32),
    Precision.INT4: (Precision.BF16, Precision.FP32),  # a format of stored weights; multiplied in 16 bits
    Precision.NVFP4: (Precision.NVFP4, Precision.FP8, Precision.BF16, Precision.FP32),
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way between GPUs: time = latency_s + factor * bytes / bandwidth.

    Attributes:
        latency_s: alpha, launch included.
        bandwidth: bytes per second and GPU in one direction that a collective reaches ("bus bandwidth").
    """

    latency_s: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Laws:
    """The constants of the cost laws on one type of GPU; few, chosen or measured, with their origin in the data file.

    GEMM: t = launch_s + sqrt((2MKN / (gemm * peak))^2 + (bytes / (memory * bandwidth))^2)   (research: three constants
    fit 37,584 measured GEMMs within 6 to 10 %).

    Attributes:
        gemm: share of the peak that large matrix products reach, in 32 and 16 bits.
        gemm_narrow: the same in 8 and 4 bits.
        memory: share of the memory bandwidth that streams reach.
        launch_s: per kernel.
        attention: share of the peak that fused (flash) attention reaches, forward, by FLOPs of the pairs it needs.
        host_s: of the host, to start the kernels of a dense half layer in one pass; a half is never faster.
    """

    gemm: float
    gemm_narrow: float
    memory: float
    launch_s: float
    attention: float
    host_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One type of GPU.

    Attributes:
        name: catalogue name, as on the command line ("a800-80g").
        title: as its maker calls it.
        memory: bytes that a program can have.
        peak: dense FLOP/s by precision; what is absent is computed in the next wider one.
        bandwidth: of its memory, bytes per second.
        node: the link within a node.
        network: the link out of the node, per GPU.
        pair: from one GPU to one other of the node, where it is known apart from `node`.
        gpus_per_node: as it is usually built.
        laws: constants.
        source: where these figures are from.
        origin: where the constants of the laws are from.
    """

    name: str
    title: str
    memory: float
    peak: Mapping[Precision, float]
    bandwidth: float
    node: Link
    network: Link
    gpus_per_node: int
    laws: Laws
    source: str
    origin: str = ""
    pair: Link | None = None

    def __hash__(self) -> int:
        return hash((self.name, self.laws))  # `peak` is a mapping; equality compares all of it

    def flops(self, precision: Precision) -> float:
        """Peak FLOP/s in `precision`, or in the next wider one that the GPU has."""
        return self.peak[self.computed_in(precision)]

    def computed_in(self, precision: Precision) -> Precision:
        """`precision`, or the next wider one that the GPU has."""
        return next(wider for wider in _WIDER[precision] if wider in self.peak)

    def reached(self, precision: Precision) -> float:
        """FLOP/s that large matrix products reach."""
        wide = self.computed_in(precision) in (Precision.FP32, Precision.BF16)
        return self.flops(precision) * (self.laws.gemm if wide else self.laws.gemm_narrow)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal GPUs in nodes.

    Attributes:
        gpu: the type.
        num_gpus: in all.
        gpus_per_node: neighbours by rank number that share the node's link.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int

    def link(self, ranks: int, stride: int = 1) -> Link:
        """The slowest link within a group of `ranks` whose numbers are `stride` apart."""
        return self.gpu.node if self.neighbours(ranks, stride) == ranks else self.gpu.network

    def neighbours(self, ranks: int, stride: int = 1) -> int:
        """How many of a group's ranks share a node."""
        return max(1, min(ranks, self.gpus_per_node // stride))
