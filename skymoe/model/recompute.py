"""Activation checkpointing that never re-routes.

Under plain checkpointing the backward pass runs the layer again, router included; on another kernel, or after a
change of the router's inputs in the last bit, some tokens would be sent to other experts than in the forward pass,
and the gradient would be that of another function. Here the *choice* is kept: the result of every top-k is saved in
the forward pass and handed back in the recomputation (selective checkpointing, by operator). It costs T*K ids a
layer. Counts cannot be doubled, because they leave the layer as return values of the first forward; the recomputation
returns nothing to anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _save_choices(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_choice = op is torch.ops.aten.topk.default
    return CheckpointPolicy.MUST_SAVE if is_choice else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_layer(layer: Callable[..., Any], *args: Any) -> Any:
    """Run `layer(*args)`, keeping only its inputs and its routing choices for the backward pass."""
    return checkpoint(
        layer, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(_save_choices)
    )
