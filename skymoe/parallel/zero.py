"""ZeRO-1: every rank holds whole weights and gradients, and a dp-th of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.mesh import Mesh
from skymoe.weights.slices import Box, Slice

Read = Callable[[str, str, Box], Tensor | None]


class SavedPiece(NamedTuple):
    """A part of a tensor of the checkpoint.

    Attributes:
        stem: of the file: "model" or "optimizer".
        name: of the tensor: a parameter's, or `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`, `/master`.
        whole_shape: of the whole tensor.
        box: which part of it; () for the scalar `/step`.
        tensor: its values, a view (maybe not contiguous) that the next `update` changes.
    """

    stem: str
    name: str
    whole_shape: tuple[int, ...]
    box: Box
    tensor: Tensor


class ZeroOptimizer:
    """AdamW over the parameters of this rank's stages, its state divided over dp.

    One step: `drop_gradients` (or a fresh optimizer), backward passes, `reduce(stage)` for each own stage as soon as its
    gradients are complete, `gradient_norm`, then `update` (the gradients are used up) or `drop_gradients`. Before the
    first forward of a stage: `ready(stage)`. Every rank makes the same calls; the order of `reduce` is the same on all
    ranks of a pipeline rank.

    Args:
        stages: parameters by name for each stage of this rank, with what the rank has of them (no buffers). A table of
            tied embeddings whose first and last stage are both here is one object in both mappings. Every parameter's
            values are moved into a flat buffer (`parameter.data` becomes a view), and its `.grad` is set for good.
        mesh: of this rank.
        settings: of AdamW.
        group_of: the settings of a parameter, from its name and itself.
        tied: names that the first and the last stage share: `{"embed.weight"}` with tied embeddings, else empty.
        gradients: format in which gradients are added up over micro-batches and ranks.
        overlap: leave collectives running behind `reduce` and `update`; the results are the same bits.
        bucket_bytes: gradients that travel in one collective, at most.
    """

    def __init__(
        self,
        stages: Mapping[int, Mapping[str, tuple[nn.Parameter, Slice]]],
        mesh: Mesh,
        settings: AdamWSettings,
        group_of: Callable[[str, nn.Parameter], GroupSettings],
        *,
        tied: Collection[str],
        gradients: torch.dtype = torch.float32,
        overlap: bool = True,
        bucket_bytes: int = 256 << 20,
    ) -> None:
        raise NotImplementedError

    def reduce(self, stage: int) -> None:
        """Sum the gradients of `stage`, complete on this rank, over tp (where partial) and dp: this starts it."""
        raise NotImplementedError

    def gradient_norm(self) -> Tensor:
        """Euclidean norm over all gradients of the model, fp64, the same bits on every rank.

        Reduces the stages for which `reduce` was not called, and waits for all. A collective act of the world.
        """
        raise NotImplementedError

    def update(self, lr: float, grad_norm: float) -> None:
        """Clip by the norm already known, take one step at the rate `lr`, and start the all-gather of the weights.

        The gradients are used up.
        """
        raise NotImplementedError

    def ready(self, stage: int) -> None:
        """Wait until the weights of `stage` are whole."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until all weights are whole."""
        raise NotImplementedError

    def drop_gradients(self) -> None:
        """Zero the gradients: of a step that is not taken, or of one that was."""
        raise NotImplementedError

    def pieces(self) -> Iterator[SavedPiece]:
        """What this rank saves; over all ranks every element of every tensor once. No communication."""
        raise NotImplementedError

    def restore(self, read: Read) -> None:
        """The inverse of `pieces`, from any layout. A collective act: the weights are gathered over dp.

        Args:
            read: the values of a box of a tensor, by stem and name; None where the checkpoint has no such tensor.
                Without moments a parameter starts fresh, without master copy from the weights.

        Raises:
            CheckpointError: weights are missing, or values have another shape or format than asked for.
        """
        raise NotImplementedError
