"""The receipt: is the upcycled model the dense model? Measured on the files just written, not assumed.

Both models read the same random tokens in fp32, **layer by layer**: one layer of one model is in memory at a time, so
the receipt of a model costs the memory of its largest layer, not of two whole models. `exact` needs both: the proof
for this method (`target.exactness`) and a measured difference within rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skymoe.convert.exactness import Exactness
from skymoe.model.batch import BatchInfo
from skymoe.model.load import read_parameters
from skymoe.model.transformer import Transformer
from skymoe.ops.experts import ExpertsBackend
from skymoe.spec.hf import spec_from_directory
from skymoe.weights.match import match_tensors
from skymoe.weights.reader import WeightsReader

NUM_SEQUENCES = 2
_TOLERANCE = 1e-4  # of max |dlogit|, relative to the largest logit when that is above 1


@dataclass(frozen=True)
class Receipt:
    """How the upcycled model compares with its parent at step 0.

    Attributes:
        max_abs_dlogit: largest difference of any logit; None when nothing was measured.
        kl: KL(dense || MoE), mean nats per token; None when nothing was measured.
        max_abs_logit: largest logit of the parent, the scale of the first figure.
        exact: the method is exact in real arithmetic, and the measurement agrees up to rounding.
        reason: why.
        num_tokens, seed: of the random tokens.
        computed: how it was measured.
    """

    max_abs_dlogit: float | None
    kl: float | None
    max_abs_logit: float | None
    exact: bool
    reason: str
    num_tokens: int
    seed: int
    computed: str = "fp32, layer by layer"


def measure(
    dense: Path, moe: Path, expected: Exactness, *, num_tokens: int, seed: int, narrowed: bool = False
) -> Receipt:
    """Compare the models in two directories on `NUM_SEQUENCES` random sequences of `num_tokens` tokens.

    Args:
        dense, moe: model directories.
        expected: what the method promises.
        num_tokens: per sequence; 0 measures nothing and repeats the promise.
        seed: of the tokens.
        narrowed: the conversion rounded the weights to a narrower format, so that logits may differ.
    """
    if num_tokens == 0:
        reason = f"{expected.reason} (not measured)"
        return Receipt(None, None, None, expected.exact, reason, 0, seed, computed="not at all")
    vocab_size = spec_from_directory(dense).vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(vocab_size, (NUM_SEQUENCES, num_tokens), generator=generator)
    dense_BTV, moe_BTV = streamed_logits(dense, tokens_BT), streamed_logits(moe, tokens_BT)
    difference = float((dense_BTV - moe_BTV).abs().max())
    scale = float(dense_BTV.abs().max())
    kl = float(mean_kl(dense_BTV, moe_BTV))
    agrees = difference <= _TOLERANCE * max(1.0, scale)  # False for NaN
    reason = expected.reason
    if expected.exact and not agrees and narrowed:
        reason = f"the weights were rounded to a narrower format; before that, {reason}"
    elif expected.exact and not agrees:
        reason = f"it should be ({reason}), but a logit differs by {difference:.3g}: please report this"
    return Receipt(difference, kl, scale, expected.exact and agrees, reason, tokens_BT.numel(), seed)


def mean_kl(p_logits_BTV: Tensor, q_logits_BTV: Tensor) -> Tensor:
    """KL(p || q) in nats, averaged over the tokens, summed in fp64 row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for p_TV, q_TV in zip(p_logits_BTV, q_logits_BTV, strict=True):
        p, q = F.log_softmax(p_TV.double(), -1), F.log_softmax(q_TV.double(), -1)
        total += (p.exp() * (p - q)).sum()
    return total / p_logits_BTV[..., 0].numel()


@torch.no_grad()
def streamed_logits(directory: Path, tokens_BT: Tensor) -> Tensor:
    """Logits (B, T, V) in fp32 of the model in `directory`, with one layer in memory at a time."""
    spec = spec_from_directory(directory)
    with torch.device("meta"):
        model = Transformer(spec, experts=ExpertsBackend.LOOP)
    with WeightsReader(directory) as reader:
        match = match_tensors(spec, reader.names(), where=directory)

        def fill(module: nn.Module, prefix: str) -> None:
            state = read_parameters(reader, spec, match, dtype=torch.float32, prefix=prefix)
            module.load_state_dict(state, strict=True, assign=True)

        fill(model.embed, "embed.")
        x_BTD = model.embed(tokens_BT)
        inputs = model.attention_inputs(tokens_BT, BatchInfo(), None)
        for layer, block in enumerate(model.layers):
            fill(block, f"layers.{layer}.")
            x_BTD, _ = block(x_BTD, inputs, BatchInfo())
            block.to("meta")  # lets go of the weights
        fill(model.norm, "norm.")
        if model.head is not None:
            fill(model.head, "head.")
        return model.logits(model.norm(x_BTD))
