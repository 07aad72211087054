"""Folding gate normalization into the router, approximately: one temperature per layer (`--fold-gate-norm`).

    z~ = lambda (z - mu) / (sigma + eps)          Eq. 6, of one token's logits z = W x
    z' = c (z - mu) = W' x,   W' = c (W - mean of the rows of W)

The mean folds exactly. 1 / sigma depends on the token and does not fold; c stands for it. Since c > 0, the order of the
experts stays, so every token keeps its experts; only their combine weights change. c minimizes, per layer, the mean KL
from the true combine weights to the folded ones on a text. With p the true weights and q(c) = softmax(c z) that is

    sum_t KL(p_t || q_t(c)) = const + sum_t [log sum_i exp(c z_ti) - c sum_i p_ti z_ti],

convex in c, with derivative sum_t sum_i (q_ti - p_ti) z_ti: not positive at the smallest true factor of any token,
lambda / (sigma + eps), and not negative at the largest. Bisection between the two finds the minimum.

Each layer is fitted on what enters it in the true model. Three sequences of four are fitted on, every fourth is held
out; KL and perplexity of the whole model are of the held-out ones.

Shapes: T tokens, E experts, K chosen (or all E where the probabilities are not renormalized), B sequences, D model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.errors import ConfigError, FormatError
from skymoe.convert.parents import Parent
from skymoe.convert.replay import read_source
from skymoe.convert.streamed import RouterInput, router_inputs, streamed_compare
from skymoe.data.tokenizer import load_tokenizer
from skymoe.export.config import ExportConfig
from skymoe.export.result import Fold, FoldedLayer
from skymoe.ops.routing import gate_logits, normalize_logits
from skymoe.spec.model import MoESpec

_HELD_OUT_EVERY = 4
_MIN_SEQUENCE = 8
_MAX_BYTES_PER_TOKEN = 64  # so that of a huge file only the beginning is read
_BISECTIONS = 200


@dataclass(frozen=True)
class Fitted:
    """The temperatures, and the tokens to judge them by."""

    layers: tuple[FoldedLayer, ...]
    fit_tokens: int
    held_out_BT: Tensor

    @property
    def temperatures(self) -> Mapping[int, float]:
        """Layer to c."""
        return {layer.layer: layer.temperature for layer in self.layers}


def fit(parent: Parent, config: ExportConfig) -> Fitted:
    """Fit the temperature of every MoE layer of `parent` on `config.text`.

    Raises:
        ConfigError: the text is missing, no UTF-8 or too short.
        FormatError: SRC has no tokenizer. MissingExtraError: the package `tokenizers` is not installed.
    """
    assert parent.spec.moe is not None
    tokens_BT = calibration_tokens(parent, config)
    held_out_B = torch.arange(len(tokens_BT)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    fit_BT = tokens_BT[~held_out_B]
    routers = parent.by_parameter()
    layers = []
    for inputs in router_inputs(parent.directory, fit_BT):
        if inputs.logits_TE is not None:
            weight_ED = read_source([parent], routers[f"layers.{inputs.layer}.moe.router.weight"])
            layers.append(fold_layer(inputs, weight_ED, parent.spec.moe))
    return Fitted(tuple(layers), fit_BT.numel(), tokens_BT[held_out_B])


def held_out_change(fitted: Fitted, exported: Path, config: ExportConfig) -> Fold:
    """KL and perplexity of the model in `exported` against `config.source`, on the tokens that were held out."""
    comparison = streamed_compare(config.source, exported, fitted.held_out_BT)
    assert comparison.reference_loss is not None and comparison.loss is not None
    return Fold(
        layers=fitted.layers,
        fit_tokens=fitted.fit_tokens,
        held_out_tokens=fitted.held_out_BT.numel(),
        kl=comparison.kl,
        perplexity_before=_perplexity(comparison.reference_loss),
        perplexity_after=_perplexity(comparison.loss),
        max_kl=config.max_kl,
    )


def calibration_tokens(parent: Parent, config: ExportConfig) -> Tensor:
    """The text as sequences (B, T) of SRC's tokens; at least one in `_HELD_OUT_EVERY` can be held out."""
    assert config.text is not None
    text = _read_text(config.text, config.text_tokens * _MAX_BYTES_PER_TOKEN)
    ids = load_tokenizer(parent.directory).encode(text)[: config.text_tokens]
    length = min(config.sequence_length, parent.spec.max_position, len(ids) // _HELD_OUT_EVERY)
    if length < _MIN_SEQUENCE:
        need = f"at least {_HELD_OUT_EVERY * _MIN_SEQUENCE} are needed, some thousands are better"
        raise ConfigError(f"the text is too short: {len(ids)} tokens", where=config.text, why=need)
    if max(ids) >= parent.spec.vocab_size:
        what = f"the tokenizer knows token {max(ids)}, the model has {parent.spec.vocab_size}"
        raise FormatError(what, where=parent.directory)
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def fold_layer(inputs: RouterInput, weight_ED: Tensor, moe: MoESpec) -> FoldedLayer:
    """Fit one layer and say what that costs there."""
    assert inputs.logits_TE is not None and moe.gate_norm is not None
    norm, logits_TE = moe.gate_norm, inputs.logits_TE.double()
    deviation_T = logits_TE.std(-1, correction=norm.ddof) + norm.eps
    factor_T = norm.scale / deviation_T[deviation_T > 0]  # constant logits are indifferent to any factor
    normalized_TE = normalize_logits(logits_TE, norm)
    ids_TK = normalized_TE.topk(moe.top_k, dim=-1).indices
    of_K = ids_TK if moe.norm_topk else torch.arange(moe.num_experts).expand_as(logits_TE)
    p_TK = normalized_TE.gather(-1, of_K).softmax(-1)
    z_TK = (logits_TE - logits_TE.mean(-1, keepdim=True)).gather(-1, of_K)
    temperature = best_temperature(p_TK, z_TK, factor_T) if factor_T.numel() else norm.scale
    log_q_TK = (temperature * z_TK).log_softmax(-1)
    kl_TK = torch.xlogy(p_TK, p_TK) - p_TK * log_q_TK
    written_TE = gate_logits(inputs.x_TD, folded_router(weight_ED, temperature))
    same_T = (written_TE.topk(moe.top_k, dim=-1).indices.sort(-1).values == ids_TK.sort(-1).values).all(-1)
    low, median, high = (float(factor_T.quantile(q)) if factor_T.numel() else math.nan for q in (0.05, 0.5, 0.95))
    return FoldedLayer(
        layer=inputs.layer,
        temperature=temperature,
        true_low=low,
        true_median=median,
        true_high=high,
        mean_abs_dweight=float((log_q_TK.exp() - p_TK).abs().mean()),
        kl=float(kl_TK.sum(-1).mean()),
        same_experts=float(same_T.double().mean()),
    )


def best_temperature(p_TK: Tensor, z_TK: Tensor, factor_T: Tensor) -> float:
    """The c that minimizes the mean KL(p || softmax(c z)), fp64, by bisection between the extremes of `factor_T`."""
    wanted = (p_TK * z_TK).sum(-1).mean()
    low, high = float(factor_T.min()), float(factor_T.max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        slope = ((middle * z_TK).softmax(-1) * z_TK).sum(-1).mean() - wanted
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (low + high) / 2


def folded_router(weight_ED: Tensor, temperature: float) -> Tensor:
    """W' = c (W - mean of the rows), fp32."""
    wide_ED = weight_ED.float()
    return temperature * (wide_ED - wide_ED.mean(0, keepdim=True))


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes)
    except OSError as error:
        raise ConfigError(f"the text cannot be read: {error.strerror}", where=path) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start >= len(data) - 3 and len(data) == max_bytes:  # the cut went through a character
            return data[: error.start].decode("utf-8")
        raise ConfigError("the text is not UTF-8", where=path) from error
