"""The forward pass of a model that does not fit into memory: its own layers, with weights that are read when needed.

The layers are those of `skymoe.model`; only their leaves are exchanged (`streamed_layers.py`). A linear map reads its
rows a block at a time; experts are read one by one, and only those that some token chose; of the embedding only the
rows of these tokens, of the head a block of rows at a time. So memory holds the activations and one block of weights,
however many layers and experts there are. One layer at a time would not do: a layer of Skywork-MoE is 11 GB in fp32.

All in fp32, FP8 directories included. What is left out: caches, gradients, documents within a sequence.

Shapes: B batch, T tokens, D model, V vocabulary, E experts; N tokens that are looked at, C tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.base.progress import progress
from skymoe.convert.parents import open_parent
from skymoe.convert.running import RunningSoftmax
from skymoe.convert.streamed_layers import Weights, stream_block
from skymoe.model.batch import BatchInfo
from skymoe.model.block import Block
from skymoe.model.inputs import AttentionInputs
from skymoe.model.transformer import Transformer
from skymoe.ops.experts import ExpertsBackend
from skymoe.ops.norm import rms_norm
from skymoe.spec.model import ModelSpec

NOT_SCORED = -1  # a target that counts in no loss
_LARGE_BYTES = 10**9  # of weights, from which on a pass takes seconds and shows its progress


class RouterInput(NamedTuple):
    """What enters the feed-forward of one layer, dense or not.

    Attributes:
        layer: counted from 0.
        x_TD: hidden states after `ffn_norm`, fp32; the tokens of all sequences, one after another.
        logits_TE: the raw gate logits where the layer is a mixture of experts, else None.
    """

    layer: int
    x_TD: Tensor
    logits_TE: Tensor | None


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens.

    Attributes:
        max_abs_dlogit: largest difference of any logit.
        max_abs_logit: largest logit of the reference.
        kl: KL(reference || model), mean nats per token.
        top1_agreement: share of the tokens after which both name the same next token first.
        reference_loss, loss: mean nats per scored target, of the reference and of the model; None without targets.
        num_tokens, num_targets: how many were looked at, and scored.
        experts_reached: how many experts of the model, over all its layers, at least one token went to.
    """

    max_abs_dlogit: float
    max_abs_logit: float
    kl: float
    top1_agreement: float
    reference_loss: float | None
    loss: float | None
    num_tokens: int
    num_targets: int
    experts_reached: int


def streamed_logits(directory: Path, tokens_BT: Tensor) -> Tensor:
    """Logits (B, T, V) in fp32 of the model in `directory`. Raises FormatError."""
    with open_streamed(directory) as model:
        hidden_BTD = model.hidden(tokens_BT)
        return torch.cat([F.linear(hidden_BTD, rows_CD) for _, rows_CD in model.head()], dim=-1)


def streamed_losses(directory: Path, tokens_BT: Tensor) -> Tensor:
    """-log p of every next token, (B, T - 1) fp64 nats. Never holds the logits of more than a block of the vocabulary.

    Raises:
        FormatError: no such model, or anything in it is broken.
    """
    targets_BT = next_tokens(tokens_BT)
    with open_streamed(directory) as model:
        hidden_ND = model.hidden(tokens_BT).flatten(0, 1)
        running = RunningSoftmax(targets_BT.flatten())
        for part, rows_CD in model.head():
            running.add(part, F.linear(hidden_ND, rows_CD))
    return running.losses().view_as(targets_BT)[:, :-1]


def streamed_compare(
    reference: Path, model: Path, tokens_BT: Tensor, *, targets_BT: Tensor | None = None
) -> Comparison:
    """How `model` differs from `reference`; the two heads are walked together, a block of the vocabulary at a time.

    Args:
        reference, model: model directories of one vocabulary.
        tokens_BT: int64.
        targets_BT: the token that follows each token, `NOT_SCORED` where it counts in no loss; default: every next one.

    Raises:
        FormatError: no such model, or anything in it is broken. ConfigError: the vocabularies differ.
    """
    targets_N = (next_tokens(tokens_BT) if targets_BT is None else targets_BT).flatten()
    with open_streamed(reference) as first, open_streamed(model) as second:
        _require_same_vocabulary(first, second)
        p_ND, q_ND = (side.hidden(tokens_BT).flatten(0, 1) for side in (first, second))
        p, q = RunningSoftmax(targets_N), RunningSoftmax(targets_N)
        difference, scale = torch.zeros(()), torch.zeros(())
        for (part, p_CD), (_, q_CD) in zip(first.head(), second.head(), strict=True):
            p_NC, q_NC = F.linear(p_ND, p_CD), F.linear(q_ND, q_CD)
            difference = torch.maximum(difference, (p_NC - q_NC).abs().max())
            scale = torch.maximum(scale, p_NC.abs().max())
            p.add(part, p_NC, other_NC=q_NC)
            q.add(part, q_NC)
    scored_N = targets_N != NOT_SCORED
    losses = [float(side.losses()[scored_N].mean()) if scored_N.any() else None for side in (p, q)]
    return Comparison(
        max_abs_dlogit=float(difference),
        max_abs_logit=float(scale),
        kl=float(p.kl(q).mean()),
        top1_agreement=float((p.top_N == q.top_N).double().mean()),
        reference_loss=losses[0],
        loss=losses[1],
        num_tokens=targets_N.numel(),
        num_targets=int(scored_N.sum()),
        experts_reached=second.experts_reached,
    )


def router_inputs(directory: Path, tokens_BT: Tensor) -> Iterator[RouterInput]:
    """The hidden states that enter the feed-forward of each layer, in layer order.

    Memory: the activations of `tokens_BT` (some T x (D + 3 F) floats) and one block of weights; what the caller keeps
    of the answers is the caller's.

    Raises:
        FormatError: no such model, or anything in it is broken.
    """
    with open_streamed(directory) as model:
        yield from model.layers(model.embed(tokens_BT), tokens_BT)


def next_tokens(tokens_BT: Tensor) -> Tensor:
    """The token that follows each token; `NOT_SCORED` after the last of a sequence."""
    return F.pad(tokens_BT[:, 1:], (0, 1), value=NOT_SCORED)


@contextmanager
def open_streamed(directory: Path) -> Iterator[StreamedModel]:
    """The model in `directory`, open for streamed forward passes. Raises FormatError."""
    with open_parent(directory, decode_to=DType.FLOAT32) as parent:
        yield StreamedModel(parent.spec, Weights(parent))


class StreamedModel:
    """A decoder whose weights stay on the disk."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec, self._weights = spec, weights
        with torch.device("meta"):
            self._model = Transformer(spec, experts=ExpertsBackend.LOOP)

    @property
    def experts_reached(self) -> int:
        """How many experts some token has gone to so far, over all layers."""
        return len(self._weights.reached)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D); only these tokens' rows are read."""
        ids, inverse_BT = tokens_BT.unique(return_inverse=True)
        reader, name = self._weights.parent.reader, self._weights.plain["embed.weight"].name
        rows = [reader.slice(name, range(token, token + 1)) for token in ids.tolist()]
        return torch.cat(rows).float()[inverse_BT]

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states after the final norm, (B, T, D)."""
        x_BTD = self.embed(tokens_BT)
        for _ in self.layers(x_BTD, tokens_BT):
            pass
        return rms_norm(x_BTD, self._weights.read(self._weights.plain["norm.weight"]), self.spec.norm_eps)

    @torch.no_grad()
    def layers(self, x_BTD: Tensor, tokens_BT: Tensor) -> Iterator[RouterInput]:
        """Run the layers, changing `x_BTD` in place; after each, what its feed-forward was given."""
        inputs = self._model.attention_inputs(tokens_BT, BatchInfo(), None)
        is_large = self._weights.num_bytes >= _LARGE_BYTES
        shown = progress("forward", self.spec.num_layers, "layer") if is_large else nullcontext()
        with shown as bar:
            for layer in range(self.spec.num_layers):
                yield self._layer(layer, x_BTD, inputs)
                if bar is not None:
                    bar.advance()

    def head(self) -> Iterator[tuple[range, Tensor]]:
        """The output projection (V, D) in blocks: which tokens of the vocabulary, and their rows in fp32."""
        plain = self._weights.plain
        return self._weights.rows(plain.get("head.weight", plain["embed.weight"]))

    def _layer(self, layer: int, x_BTD: Tensor, inputs: AttentionInputs) -> RouterInput:
        with torch.device("meta"):
            block = Block(self.spec, layer, ExpertsBackend.LOOP)
        stream_block(block, self._weights, f"layers.{layer}.")
        x_BTD += block.attention(block.attention_norm(x_BTD), inputs)
        entering_BTD = block.ffn_norm(x_BTD)
        if block.moe is None:
            assert block.mlp is not None
            x_BTD += block.mlp(entering_BTD)
            return RouterInput(layer, entering_BTD.flatten(0, 1), None)
        y_BTD, routing = block.moe(entering_BTD, BatchInfo())
        x_BTD += y_BTD
        return RouterInput(layer, entering_BTD.flatten(0, 1), routing.logits_TE)


def _require_same_vocabulary(first: StreamedModel, second: StreamedModel) -> None:
    sizes = first.spec.vocab_size, second.spec.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: nothing can be compared")
