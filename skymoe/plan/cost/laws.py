"""Two laws for what one GPU does: matrix products, and streams through memory.

    GEMM      t = launch + sqrt( (2MKN / (gemm * peak))^2 + (bytes / (memory * bandwidth))^2 )
    stream    t = kernels * launch + bytes / (memory * bandwidth)

The root of squares is the smooth form of a roofline: small products approach the memory line, large ones the
arithmetic line, and near the corner both cost. With three constants per GPU it meets 37,584 products that Vidur
(Agrawal et al. 2024) measured within 6 to 10 %. Left out: tile and wave quantization (a product of 129 rows costs as
much as one of 256), and the clock that falls under sustained load, which is in the constants.

A linear layer is three products: forward X W, backward dY W' (towards the input) and X' dY (gradient of the weights),
the last of which adds to a gradient buffer that is read and written. In 8 bits and below, operands are converted from
16 bits twice (once as they lie, once transposed), a stream of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skymoe.plan.hardware.gpu import Gpu, Precision

FOUR_BITS = 0.8
"""Of the share of the peak that 8 bits reach: training recipes in 4 bits turn operands before they are rounded and keep
some layers wider. Chosen on dense models of megatron_bridge, which were 15 % too fast without it."""


@dataclass(frozen=True, slots=True)
class LinearTime:
    """Seconds of a linear layer: forward, towards the input, of the weights."""

    forward: float
    inputs: float
    weights: float

    @property
    def backward(self) -> float:
        """Both its products."""
        return self.inputs + self.weights

    def __add__(self, other: LinearTime) -> LinearTime:
        return LinearTime(self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights)


NOTHING = LinearTime(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Kernels:
    """The laws on one GPU in one precision, constants resolved.

    Attributes:
        rate: FLOP/s of large products.
        stream: bytes per second.
        launch_s: per kernel.
        attention: FLOP/s of fused attention.
        operand, element: bytes of a number that is multiplied, and of one that is kept.
        gradient: bytes of a number in the gradient buffer.
    """

    rate: float
    stream: float
    launch_s: float
    attention: float
    operand: float
    element: float
    gradient: float

    @classmethod
    def of(cls, gpu: Gpu, precision: Precision, *, gradient: float = 4.0) -> Kernels:
        """Of `gpu` for layers in `precision`; attention is in 16 bits, or in 32 where all is."""
        computed = gpu.computed_in(precision)
        wide = Precision.FP32 if precision is Precision.FP32 else Precision.BF16
        return cls(
            rate=gpu.reached(precision) * (FOUR_BITS if computed is Precision.NVFP4 else 1.0),
            stream=gpu.laws.memory * gpu.bandwidth,
            launch_s=gpu.laws.launch_s,
            attention=gpu.laws.attention * gpu.flops(wide),
            operand=4.0 if precision is Precision.FP32 else computed.weight_bytes,
            element=wide.weight_bytes,
            gradient=gradient,
        )

    @classmethod
    def of_engine(cls, gpu: Gpu, precision: Precision, *, gemm: float = 1.0, memory: float = 1.0) -> Kernels:
        """Of an inference engine on `gpu`, with factors on both laws. Launches are in what it costs per layer and step,
        and what training in 4 bits turns and rounds is not there.
        """
        return cls(
            rate=gemm * gpu.reached(precision),
            stream=memory * gpu.laws.memory * gpu.bandwidth,
            launch_s=0.0,
            attention=gpu.laws.attention * gpu.flops(Precision.BF16),
            operand=precision.weight_bytes,
            element=Precision.BF16.weight_bytes,
            gradient=0.0,
        )

    def gemm(self, m: float, k: float, n: float, *, out: float | None = None) -> float:
        """(M, K) x (K, N); `out` bytes moved per number of the result."""
        moved = self.operand * (m * k + k * n) + (self.element if out is None else out) * m * n
        return self.product(2.0 * m * k * n, moved)

    def product(self, flops: float, moved: float) -> float:
        """Matrix products of `flops` in one kernel, which move `moved` bytes."""
        return self.launch_s + math.hypot(flops / self.rate, moved / self.stream)

    def attend(self, flops: float, moved: float) -> float:
        """Fused attention of `flops`, which moves `moved` bytes."""
        return self.launch_s + math.hypot(flops / self.attention, moved / self.stream)

    def memory(self, moved: float, kernels: int = 1) -> float:
        """A stream of `moved` bytes, read and written together."""
        return kernels * self.launch_s + moved / self.stream

    def linear(self, rows: float, inputs: float, outputs: float, *, times: int = 1) -> LinearTime:
        """A linear layer, or `times` equal ones in one kernel (grouped) with `rows` each."""
        forward = self.gemm(rows, inputs, outputs)
        towards = self.gemm(rows, outputs, inputs)
        weights = self.gemm(inputs, rows, outputs, out=2.0 * self.gradient)
        if times != 1:
            forward, towards, weights = (
                self.launch_s + times * (seconds - self.launch_s) for seconds in (forward, towards, weights)
            )
        if self.operand < self.element:
            convert = (self.element + 2.0 * self.operand) * times * rows / self.stream
            forward += self.launch_s + convert * inputs
            towards += self.launch_s + convert * outputs
        return LinearTime(forward, towards, weights)
