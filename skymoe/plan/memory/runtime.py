"""What programs keep beside what the mathematics needs. Three ways to run the same layer, three accounts.

    MEGATRON  fused kernels: a norm keeps input and output, probabilities go in before the last expert matrix, the loss
              turns one fp32 copy of the logits into their gradient in place (Megatron-Core)
    PLAIN     PyTorch modules and torch's cross entropy: logits in bf16, in fp32, their log-softmax and its gradient
              (14 bytes); silu(gate) is kept beside gate and up, and the outputs of experts
    SKYMOE    this package, tensor by tensor: see `own`

The 14 bytes agree with a measured peak: torchtitan, Llama 8B, 65,536 tokens over two ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Bytes and copies.

    Attributes:
        logit_bytes: alive per logit while the loss is formed.
        gate_copies: tensors of inner width that a dense gated activation keeps (its inputs are two of them).
        routed_outputs: outputs of experts are kept.
        is_ours: this package, which has an account of its own; the others do not count.
    """

    logit_bytes: float = 6.0
    gate_copies: int = 2
    routed_outputs: bool = False
    is_ours: bool = False


MEGATRON = Runtime()
PLAIN = Runtime(logit_bytes=14.0, gate_copies=3, routed_outputs=True)
SKYMOE = Runtime(is_ours=True)
