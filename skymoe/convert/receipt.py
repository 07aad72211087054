"""The receipt: is the new model the old one? Measured on the files just written, not assumed.

Both models read the same tokens in fp32 (`text.py` says which), each a few tensors at a time (`streamed.py`), so a
receipt works for a model of any size. `exact` needs both: the proof for this method (`Exactness`, the table of
docs/upcycling.md as code) and a measured difference within rounding. An expert that no token reached has not been
looked at: `experts_reached` says how many were. docs/receipt.md explains every figure.
"""

from __future__ import annotations

import math
from pathlib import Path

from skymoe.convert.exactness import Exactness, export_targets
from skymoe.convert.measured import Receipt
from skymoe.convert.streamed import Comparison, streamed_compare
from skymoe.convert.text import sample_tokens
from skymoe.spec.hf import spec_from_directory

_TOLERANCE = 1e-4  # of max |dlogit|, relative to the largest logit when that is above 1


def measure(
    reference: Path, model: Path, expected: Exactness, *, num_tokens: int, seed: int, narrowed: bool = False
) -> Receipt:
    """Compare the models in two directories of one vocabulary.

    Args:
        reference: the parent; of several parents, the base.
        model: what was made of it.
        expected: what the method promises.
        num_tokens: per sequence; 0 measures nothing and repeats the promise.
        seed: of the random tokens.
        narrowed: the conversion rounded the weights to a narrower format, so that logits may differ.

    Raises:
        FormatError: a model is missing, broken or hostile. ConfigError: the vocabularies differ.
    """
    spec = spec_from_directory(model)
    exports = export_targets(spec)
    num_experts = len(spec.moe_layer_ids) * spec.moe.num_experts if spec.moe else 0
    if num_tokens == 0:
        reason = f"{expected.reason} (not measured)"
        return Receipt(
            None, None, None, expected.exact, reason, 0, seed, "not at all", num_experts=num_experts, exports=exports
        )
    sample = sample_tokens(reference, spec.vocab_size, num_tokens=num_tokens, seed=seed)
    found = streamed_compare(reference, model, sample.tokens_BT, targets_BT=sample.targets_BT)
    exact, reason = judge(expected, found, narrowed=narrowed)
    return Receipt(
        max_abs_dlogit=_finite(found.max_abs_dlogit),
        kl=_finite(found.kl),
        max_abs_logit=_finite(found.max_abs_logit),
        exact=exact,
        reason=reason,
        num_tokens=found.num_tokens,
        seed=seed,
        tokens=sample.told,
        reference_loss=_finite(found.reference_loss),
        loss=_finite(found.loss),
        reference_perplexity=_perplexity(found.reference_loss),
        perplexity=_perplexity(found.loss),
        top1_agreement=found.top1_agreement,
        experts_reached=found.experts_reached,
        num_experts=num_experts,
        exports=exports,
    )


def judge(expected: Exactness, found: Comparison, *, narrowed: bool) -> tuple[bool, str]:
    """Whether promise and measurement together say "exact", and why or why not."""
    if not math.isfinite(found.max_abs_dlogit):
        told = f"it should be exact ({expected.reason})" if expected.exact else expected.reason
        return False, f"a logit is infinite or not a number; {told}"
    agrees = found.max_abs_dlogit <= _TOLERANCE * max(1.0, found.max_abs_logit)
    if not expected.exact or agrees:
        return expected.exact, expected.reason
    if narrowed:
        return False, f"the weights were rounded to a narrower format; before that, {expected.reason}"
    differs = f"a logit differs by {found.max_abs_dlogit:.3g}: please report this"
    return False, f"it should be ({expected.reason}), but {differs}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None or not loss < 700 else math.exp(loss)  # e^710 is no double
