"""Evaluation in the loop: held-out loss, exact bits per byte, and who does the work, per domain.

    bits per byte = sum of losses in nats / (ln 2 * bytes of the scored tokens)

counts the bytes of the very tokens that were scored, so it compares models across tokenizers. It needs the
tokenizer; without one only nats per token are reported. The windows are the same each time and nothing here draws a
random number, so evaluating leaves no trace in the training.

Shapes: V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from skymoe.data.evaluation import EvaluationWindows
from skymoe.data.packing import IGNORE, Batch
from skymoe.model.transformer import Transformer
from skymoe.ops.loss import linear_cross_entropy
from skymoe.ops.similarity import expert_similarity
from skymoe.train.batches import micro_batch
from skymoe.train.objective import autocast, moe_modules


@dataclass(frozen=True)
class Held:
    """What evaluation reads.

    Attributes:
        domains: windows by domain name.
        byte_lengths_V: bytes of every token, or None without a tokenizer.
        batch: sequences per forward.
        isolate_documents: as in training.
    """

    domains: Mapping[str, EvaluationWindows]
    byte_lengths_V: npt.NDArray[np.integer[Any]] | None
    batch: int
    isolate_documents: bool

    def bytes_of(self, rows: Batch) -> int:
        """Bytes of the scored tokens of `rows`; 0 without a tokenizer."""
        if self.byte_lengths_V is None:
            return 0
        return int(self.byte_lengths_V[rows.targets_BT[rows.targets_BT != IGNORE]].sum(dtype=np.int64))


@dataclass
class DomainSums:
    """Sums over one domain: divided last, and added over domains for `all`."""

    loss: float = 0.0
    targets: int = 0
    bytes: int = 0

    def add(self, other: DomainSums) -> None:
        """Add the sums of another domain."""
        self.loss, self.targets, self.bytes = (
            self.loss + other.loss,
            self.targets + other.targets,
            self.bytes + other.bytes,
        )

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.loss / max(1, self.targets)

    @property
    def bits_per_byte(self) -> float:
        """Needs at least one byte."""
        return self.loss / (math.log(2) * self.bytes)


@torch.no_grad()
def evaluate(model: Transformer, held: Held, *, compute: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    """The fields of an `eval` line: loss, bits_per_byte, expert_load per domain, expert_similarity per MoE layer."""
    found = {
        domain: _evaluate_domain(model, windows, held, compute, device) for domain, windows in held.domains.items()
    }
    return figures(found, layer_similarities(model))


def figures(found: Mapping[str, tuple[DomainSums, list[Tensor]]], similarities: list[float]) -> dict[str, Any]:
    """The fields of an `eval` line, from each domain's sums and counts per layer and expert."""
    sums = {domain: domain_sums for domain, (domain_sums, _) in found.items()}
    load = {
        domain: [(counts_E / counts_E.sum().clamp_min(1)).tolist() for counts_E in counts_LE]
        for domain, (_, counts_LE) in found.items()
    }
    everything = DomainSums()
    for domain_sums in sums.values():
        everything.add(domain_sums)
    sums["all"] = everything
    return {
        "loss": {name: part.nats_per_token for name, part in sums.items()},
        "bits_per_byte": {name: part.bits_per_byte for name, part in sums.items() if part.bytes},
        "expert_load": load if similarities else {},
        "expert_similarity": similarities,
    }


def layer_similarities(model: Transformer) -> list[float]:
    """Mean pairwise cosine between the experts of each MoE layer."""
    return [expert_similarity(moe.experts.gate_up, moe.experts.down) for moe in moe_modules(model)]


def _evaluate_domain(
    model: Transformer, windows: EvaluationWindows, held: Held, compute: torch.dtype | None, device: torch.device
) -> tuple[DomainSums, list[Tensor]]:
    sums = DomainSums()
    counts_LE = [torch.zeros(0)] * len(model.spec.moe_layer_ids)
    for rows in windows.batches(held.batch):
        micro = micro_batch(rows, held.isolate_documents, device)
        with autocast(compute, device):
            out = model.hidden(micro.tokens_BT, micro.info)
            loss, num_targets = linear_cross_entropy(out.hidden_BTD, model.head_weight, micro.targets_BT)
        sums.loss += float(loss)
        sums.targets += int(num_targets)
        sums.bytes += held.bytes_of(rows)
        for layer, routing in enumerate(out.routings):
            counts_LE[layer] = routing.counts_E + counts_LE[layer] if counts_LE[layer].numel() else routing.counts_E
    return sums, counts_LE
