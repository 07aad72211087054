"""The samples of one optimizer step, cut into micro-batches of tensors.

What the loss is divided by is known before the first forward pass: targets and tokens of the *whole* step are
counted here, on the numpy side. Under data parallelism they will be summed over ranks at this very place.

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
    mixture: Mixture, first_sample: int, num_samples: int, *, micro_sequences: int, device: torch.device
) -> StepBatch:
    """Samples `first_sample` and on, as the micro-batches of one step."""
    samples = batch(mixture, first_sample, num_samples)
    starts = range(0, num_samples, micro_sequences)
    micros = tuple(
        micro_batch(samples.rows(start, start + micro_sequences), mixture.isolate_documents, device) for start in starts
    )
    return StepBatch(
        micros=micros,
        num_targets=int(np.count_nonzero(samples.targets_BT != IGNORED)),
        num_tokens=sum(micro.num_tokens for micro in micros),
        num_samples=num_samples,
    )


def micro_batch(rows: Batch, isolate_documents: bool, device: torch.device) -> MicroBatch:
    """`rows` as tensors over the same memory. Positions and document ids are left out where they say nothing."""
    num_tokens = int(np.count_nonzero(rows.valid_BT))
    return MicroBatch(
        tokens_BT=torch.from_numpy(rows.tokens_BT).to(device),
        targets_BT=torch.from_numpy(rows.targets_BT).to(device),
        info=BatchInfo(
            positions_BT=torch.from_numpy(rows.positions_BT).to(device) if isolate_documents else None,
            document_ids_BT=torch.from_numpy(rows.document_ids_BT).to(device) if isolate_documents else None,
            valid_BT=None if num_tokens == rows.valid_BT.size else torch.from_numpy(rows.valid_BT).to(device),
        ),
        num_tokens=num_tokens,
    )
