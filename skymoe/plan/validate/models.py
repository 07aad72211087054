"""The model of a case: from its fields, and what they lack from public configurations.

Tables print a model's name and leave its shape to the reader. `PUBLIC` holds what is needed of some well-known
configurations that tables name so, in the field names of the case file; a field of the case wins. Models with layers
that are neither attention nor feed-forward (Mamba) are not judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from skymoe.plan.shape import AttentionShape, FfnShape, LayerShape, ModelShape
from skymoe.plan.validate.cases import Case, NotJudgedError

_MLA: Final = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

PUBLIC: Final[Mapping[str, Mapping[str, Any]]] = {
    # config.json of deepseek-ai/DeepSeek-V3
    "deepseek-v3": {
        "num_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "vocab_size": 129280, "gated_mlp": True,
        "mla": {"q_lora_rank": 1536, **_MLA},
        "moe": {"num_experts": 256, "top_k": 8, "moe_ffn_hidden_size": 2048,
                "shared_expert_ffn_hidden_size": 2048, "num_dense_layers": 3, "dense_ffn_hidden_size": 18432},
    },
    # config.json of deepseek-ai/DeepSeek-V2
    "deepseek-v2": {
        "num_layers": 60, "hidden_size": 5120, "num_attention_heads": 128, "vocab_size": 102400, "gated_mlp": True,
        "mla": {"q_lora_rank": 1536, **_MLA},
        "moe": {"num_experts": 160, "top_k": 6, "moe_ffn_hidden_size": 1536,
                "shared_expert_ffn_hidden_size": 3072, "num_dense_layers": 1, "dense_ffn_hidden_size": 12288},
    },
    # config.json of moonshotai/Moonlight-16B-A3B
    "moonlight-16b": {
        "num_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "vocab_size": 163840, "gated_mlp": True,
        "mla": {"q_lora_rank": 0, **_MLA},
    },
    # config.json of internlm/internlm-7b
    "internlm-7b": {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_kv_heads": 32,
        "ffn_hidden_size": 11008, "vocab_size": 103168, "gated_mlp": True,
    },
    # Korthikanti et al. 2022, table 3
    "gpt-1t": {
        "num_layers": 128, "hidden_size": 25600, "num_attention_heads": 160, "ffn_hidden_size": 102400,
        "vocab_size": 51200, "gated_mlp": False, "tied_embeddings": True,
    },
    "gpt-530b": {
        "num_layers": 105, "hidden_size": 20480, "num_attention_heads": 128, "ffn_hidden_size": 81920,
        "vocab_size": 51200, "gated_mlp": False, "tied_embeddings": True,
    },
    "gpt-175b": {
        "num_layers": 96, "hidden_size": 12288, "num_attention_heads": 96, "ffn_hidden_size": 49152,
        "vocab_size": 51200, "gated_mlp": False, "tied_embeddings": True,
    },
    "gpt-22b": {
        "num_layers": 48, "hidden_size": 6144, "num_attention_heads": 64, "ffn_hidden_size": 24576,
        "vocab_size": 51200, "gated_mlp": False, "tied_embeddings": True,
    },
}  # fmt: skip

_GPT_VOCABULARY = 50_304  # GPT-2's 50257, padded; where a GPT's table has none
_SENTENCE_PIECE = 32_000  # zero_bubble: its repository's tokenizer; with 50,000 its last stages would be far too long


@dataclass(frozen=True, kw_only=True)
class CaseModel:
    """A model and what was assumed of it.

    Attributes:
        shape: the model.
        assumed: in words.
        clamped: experts have biases and clamped gates (GPT-OSS).
        predicts_two: trained with one multi-token-prediction layer and a second use of the head (DeepSeek-V3).
    """

    shape: ModelShape
    assumed: tuple[str, ...] = ()
    predicts_two: bool = False
    clamped: bool = False


def case_model(case: Case) -> CaseModel:
    """The model of `case`. Raises NotJudgedError when its shape is not known."""
    name = case.text("model.name")
    if re.search(r"mamba|hybrid|jamba|vlm|diffusion|bert|t5\b", name, re.IGNORECASE):
        raise NotJudgedError("layers of a kind that is not modelled")
    known, assumed = _completed(case, name)
    vocabulary = known.count("model.vocab_size", 0, low=0)
    if not vocabulary:
        if not re.match(r"gpt", name, re.IGNORECASE):
            raise NotJudgedError("the vocabulary is not known")
        vocabulary = _SENTENCE_PIECE if case.group == "zero_bubble" else _GPT_VOCABULARY
        assumed = (*assumed, f"vocabulary of {vocabulary}")
    gated = known.flag("model.gated_mlp", True)
    old_gpt = not gated and bool(re.match(r"gpt", name, re.IGNORECASE))
    shape = ModelShape(
        name=name or "model",
        hidden_size=known.count("model.hidden_size", high=2**20),
        vocab_size=vocabulary,
        layers=_layers(known, gated, name),
        tied=known.flag("model.tied_embeddings", False),
        dropout=old_gpt and not re.search(r"core|nemo", case.text("framework"), re.IGNORECASE),
        positions=known.count("batch.seq_len", 0, low=0) if old_gpt else 0,
    )
    return CaseModel(shape=shape, assumed=assumed, predicts_two=_predicts_two(case, name), clamped=_gpt_oss(name))


def _predicts_two(case: Case, name: str) -> bool:
    """DeepSeek-V3 is trained with multi-token prediction by its authors and by NVIDIA's recipes since 2025."""
    return "deepseek-v3" in name.lower() and not case.has("parallel.no_mtp") and "dgxc" not in case.group


def _completed(case: Case, name: str) -> tuple[Case, tuple[str, ...]]:
    """The case with fields of a public configuration where its own are absent."""
    written = re.sub(r"[\s_]+", "-", name.lower())
    key = next((key for key in PUBLIC if written.startswith(key)), None)
    if key is None or "proxy" in written:
        return case, ()
    model = case.get("model")
    own = model if isinstance(model, dict) else {}
    public = PUBLIC[key]
    lacking = sorted(field for field in public if own.get(field) is None)
    if not lacking:
        return case, ()
    merged = {**own, **{field: public[field] for field in lacking}}
    completed = replace(case, fields={**case.fields, "model": merged})
    return completed, (f"{', '.join(lacking)} from the public configuration of {key}",)


def _layers(case: Case, gated: bool, name: str) -> tuple[LayerShape, ...]:
    num_layers = case.count("model.num_layers", high=2000)
    attentions = _attentions(case, name)
    dense_inner = case.count("model.ffn_hidden_size", 0, low=0)
    num_dense = 0
    moe: FfnShape | None = None
    if case.has("model.moe"):
        num_experts = case.count("model.moe.num_experts", high=2**16)
        moe = FfnShape(
            inner=case.count("model.moe.moe_ffn_hidden_size", dense_inner or None),
            gated=gated,
            num_experts=num_experts,
            top_k=case.count("model.moe.top_k", high=num_experts),
            shared_inner=case.count("model.moe.shared_expert_ffn_hidden_size", 0, low=0),
        )
        num_dense = case.count("model.moe.num_dense_layers", 0, low=0, high=num_layers)
        dense_inner = case.count("model.moe.dense_ffn_hidden_size", dense_inner or None) if num_dense else dense_inner
    if (moe is None or num_dense) and not dense_inner:
        raise NotJudgedError("the width of the feed-forward is not known")
    dense = FfnShape(inner=dense_inner, gated=gated)
    return tuple(
        LayerShape(
            attention=attentions[layer % len(attentions)], ffn=dense if moe is None or layer < num_dense else moe
        )
        for layer in range(num_layers)
    )


def _attentions(case: Case, name: str) -> tuple[AttentionShape, ...]:
    """Of the layers, in turn: one, or two where every second has a window (GPT-OSS: 128 tokens)."""
    hidden, heads = case.count("model.hidden_size"), case.count("model.num_attention_heads", high=2**14)
    if case.has("model.mla"):
        rope = case.count("model.mla.qk_rope_head_dim", low=0)
        width = case.count("model.mla.qk_nope_head_dim") + rope
        latent = AttentionShape(
            num_heads=heads, num_kv_heads=heads, head_dim=width, value_dim=case.count("model.mla.v_head_dim"),
            q_rank=case.count("model.mla.q_lora_rank", 0, low=0), kv_rank=case.count("model.mla.kv_lora_rank"),
            rope_dim=rope,
        )  # fmt: skip
        return (latent,)
    width = case.count("model.head_dim", max(1, hidden // heads), high=2**14)
    kv_heads = case.count("model.num_kv_heads", heads, high=heads)
    whole = AttentionShape(num_heads=heads, num_kv_heads=kv_heads, head_dim=width, value_dim=width)
    return (replace(whole, window=128), whole) if _gpt_oss(name) else (whole,)


def _gpt_oss(name: str) -> bool:
    return re.match(r"gpt-?oss", name, re.IGNORECASE) is not None
