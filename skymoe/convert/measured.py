"""What a receipt says, as data and in words. No torch, so that every job's report can carry one.

`receipt.py` measures; docs/receipt.md explains every figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from skymoe.convert.exactness import ExportTarget

RECEIPT_NAME = "receipt.json"


@dataclass(frozen=True)
class Receipt:
    """How a model compares at step 0 with the one it was made from. A figure is None where nothing was measured, or
    where it is not a finite number; `reason` and `computed` tell which.

    Attributes:
        max_abs_dlogit: largest difference of any logit.
        kl: KL(reference || model), mean nats per token.
        max_abs_logit: largest logit of the reference, the scale of the first figure.
        exact: the method is exact in real arithmetic, and the measurement agrees up to rounding.
        reason: why.
        num_tokens, seed: how many tokens were read, and what chose the random ones.
        computed: how it was measured.
        tokens: what was read: text or random.
        reference_loss, loss: mean nats per scored token, before and after.
        reference_perplexity, perplexity: e to the power of these.
        top1_agreement: share of the tokens after which both name the same next token first.
        experts_reached, num_experts: of the new model, over all its layers; 0 of 0 where it is dense.
        exports: what becomes of the model in every export format.
    """

    max_abs_dlogit: float | None
    kl: float | None
    max_abs_logit: float | None
    exact: bool
    reason: str
    num_tokens: int
    seed: int
    computed: str = "fp32, a few tensors at a time"
    tokens: str = "none"
    reference_loss: float | None = None
    loss: float | None = None
    reference_perplexity: float | None = None
    perplexity: float | None = None
    top1_agreement: float | None = None
    experts_reached: int = 0
    num_experts: int = 0
    exports: tuple[ExportTarget, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data for receipt.json."""
        return asdict(self)


def receipt_lines(receipt: Receipt) -> Iterator[str]:
    """The receipt for a terminal: the verdict, the losses, the formats that stay exact; a line each."""
    measured = ""
    if receipt.max_abs_dlogit is not None and receipt.kl is not None:
        measured = f" (max |dlogit| {receipt.max_abs_dlogit:.2g}, KL {receipt.kl:.2g})"
    yield f"exact: {'yes' if receipt.exact else 'no'}{measured}: {receipt.reason}"
    if receipt.loss is not None and receipt.reference_loss is not None:
        losses = f"loss {receipt.reference_loss:.4f} -> {receipt.loss:.4f} nats per token"
        yield f"{losses} on {receipt.tokens}"
    if receipt.max_abs_dlogit is not None and receipt.experts_reached < receipt.num_experts:
        missed = receipt.num_experts - receipt.experts_reached
        yield f"not looked at: {missed} of {receipt.num_experts} experts, because none of these tokens reached them"
    exact = [target.format for target in receipt.exports if target.exact]
    folded = [target.format for target in receipt.exports if target.carries and not target.exact]
    if exact or folded:
        also = f"; folded, approximately: {', '.join(folded)}" if folded else ""
        yield f"exports that stay exact: {', '.join(exact) or 'none'}{also}"
