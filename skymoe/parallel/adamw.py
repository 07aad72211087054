"""AdamW on parts of parameters: torch's fused kernel, moments and step of each part, a master copy of narrow weights.

An update is elementwise, so a rank needs the moments of no other element than those it updates. torch's own AdamW
holds state by parameter; here a parameter may lie on several ranks, and a rank has a *portion* of it. The step count
is kept per portion, as a parameter that is new in a resumed run begins at 0 while the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdamWSettings:
    """What all parameters share.

    Attributes:
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        clip: largest gradient norm over all parameters; 0 does not clip.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True)
class GroupSettings:
    """What differs between matrices, routers and vectors.

    Attributes:
        weight_decay: decoupled.
        lr_ratio: the learning rate of these parameters over that of the step.
    """

    weight_decay: float = 0.0
    lr_ratio: float = 1.0
