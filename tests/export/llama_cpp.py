"""What llama.cpp's converter reads of a model directory, written down from its source.

ggml-org/llama.cpp, commit 0c1e570 (2026-10-01): `conversion/base.py` (TextModel.__init__, set_gguf_parameters),
`conversion/llama.py` (LlamaModel), `conversion/qwen.py` (Qwen2MoeModel, Qwen3MoeModel), `conversion/olmo.py`
(OlmoeModel), and `gguf-py/gguf/tensor_mapping.py` for the names on the right.
"""

from __future__ import annotations

# config.json of every class
FIELDS = (
    "architectures", "vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "num_experts_per_tok", "rope_theta",
)  # fmt: skip
MORE_FIELDS = {
    "MixtralForCausalLM": ("num_local_experts",),
    "Qwen2MoeForCausalLM": ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"),
    "Qwen3MoeForCausalLM": ("num_experts", "moe_intermediate_size"),
    "OlmoeForCausalLM": ("num_experts",),
}

# The name of the architecture in the file, for gguf.MODEL_ARCH.
ARCHITECTURES = {
    "MixtralForCausalLM": "LLAMA",
    "Qwen2MoeForCausalLM": "QWEN2MOE",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
    "OlmoeForCausalLM": "OLMOE",
}

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_BIASES = {f"self_attn.{name}_proj.bias": f"attn_{name}.bias" for name in "qkv"}
_NORMS = {f"self_attn.{name}_norm.weight": f"attn_{name}_norm.weight" for name in "qk"}
_EXPERTS = {
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.{}.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.{}.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.{}.down_proj.weight": "ffn_down_exps.weight",
}

# In model.layers.I and blk.I; {} is the number of an expert. All experts of a layer become one tensor, looked up under
# the name in MERGED.
LAYER = {
    "MixtralForCausalLM": {
        **_LAYER,
        "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
        "block_sparse_moe.experts.{}.w1.weight": "ffn_gate_exps.weight",
        "block_sparse_moe.experts.{}.w3.weight": "ffn_up_exps.weight",
        "block_sparse_moe.experts.{}.w2.weight": "ffn_down_exps.weight",
    },
    "Qwen2MoeForCausalLM": {
        **_LAYER,
        **_BIASES,
        **_EXPERTS,
        "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
        "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
        "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
        "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    },
    "Qwen3MoeForCausalLM": {**_LAYER, **_NORMS, **_EXPERTS},
    "OlmoeForCausalLM": {**_LAYER, **_NORMS, **_EXPERTS},
}
OPTIONAL = tuple(_BIASES)
MERGED = {
    "block_sparse_moe.experts.{}.w1.weight": "layers.{}.feed_forward.experts.w1.weight",
    "block_sparse_moe.experts.{}.w2.weight": "layers.{}.feed_forward.experts.w2.weight",
    "block_sparse_moe.experts.{}.w3.weight": "layers.{}.feed_forward.experts.w3.weight",
    "mlp.experts.{}.gate_proj.weight": "model.layers.{}.mlp.experts.gate_proj.weight",
    "mlp.experts.{}.up_proj.weight": "model.layers.{}.mlp.experts.up_proj.weight",
    "mlp.experts.{}.down_proj.weight": "model.layers.{}.mlp.experts.down_proj.weight",
}
