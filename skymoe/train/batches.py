"""The samples of one optimizer step, cut into micro-batches of tensors.

What the loss is divided by is known before the first forward pass: targets and tokens of the *whole* step are
counted here, on the numpy side, also where this process takes only a replica's share of the samples.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skymoe.data.packing import Batch
from skymoe.data.sampler import Mixture, batch
from skymoe.model.batch import BatchInfo
from skymoe.ops.loss import IGNORED


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass receives.

    Attributes:
        tokens_BT, targets_BT: int64; targets are -100 where nothing is scored.
        info: document boundaries and pads; None in every field that says nothing.
        num_tokens: tokens that are no pads.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    info: BatchInfo
    num_tokens: int

    @property
    def valid_T(self) -> Tensor | None:
        """Flat mask of the tokens that are no pads; None when there are no pads."""
        return None if self.info.valid_BT is None else self.info.valid_BT.flatten()


@dataclass(frozen=True)
class StepBatch:
    """The global batch of one step.

    Attributes:
        micros: its micro-batches; the last may be smaller.
        num_targets: scored targets of the whole step, by which the loss is divided.
        num_tokens: tokens of the whole step that are no pads.
        num_samples: samples consumed.
    """

    micros: tuple[MicroBatch, ...]
    num_targets: int
    num_tokens: int
    num_samples: int


def read_step(
    mixture: Mixture,
    first_sample: int,
    num_samples: int,
    *,
    micro_sequences: int,
    device: torch.device,
    replica: tuple[int, int] = (0, 1),
) -> StepBatch:
    """Samples `first_sample` and on, as the micro-batches of one step.

    Args:
        mixture: the data.
        first_sample, num_samples: which samples the step has.
        micro_sequences: sequences per micro-batch.
        device: of the tensors.
        replica: which replica of how many: each takes its contiguous share of the samples. The counts are those of
            the whole step in any case, so every replica reads all of it (8 bytes a token, from the page cache).
    """
    samples = batch(mixture, first_sample, num_samples)
    index, count = replica
    share = num_samples // count
    has_pads = count > 1 and not samples.valid_BT.all()  # replicas that exchange tokens must treat them alike
    micros = tuple(
        micro_batch(
            samples.rows(start, min(start + micro_sequences, (index + 1) * share)),
            mixture.isolate_documents,
            device,
            keep_mask=has_pads,
        )
        for start in range(index * share, (index + 1) * share, micro_sequences)
    )
    return StepBatch(
        micros=micros,
        num_targets=int(np.count_nonzero(samples.targets_BT != IGNORED)),
        num_tokens=int(np.count_nonzero(samples.valid_BT)),
        num_samples=num_samples,
    )


def micro_batch(rows: Batch, isolate_documents: bool, device: torch.device, *, keep_mask: bool = False) -> MicroBatch:
    """`rows` as tensors over the same memory. What says nothing is left out: positions, document ids, and the mask
    where there are no pads (unless `keep_mask`).
    """
    num_tokens = int(np.count_nonzero(rows.valid_BT))
    has_mask = keep_mask or num_tokens < rows.valid_BT.size
    return MicroBatch(
        tokens_BT=torch.from_numpy(rows.tokens_BT).to(device),
        targets_BT=torch.from_numpy(rows.targets_BT).to(device),
        info=BatchInfo(
            positions_BT=torch.from_numpy(rows.positions_BT).to(device) if isolate_documents else None,
            document_ids_BT=torch.from_numpy(rows.document_ids_BT).to(device) if isolate_documents else None,
            valid_BT=torch.from_numpy(rows.valid_BT).to(device) if has_mask else None,
        ),
        num_tokens=num_tokens,
    )
