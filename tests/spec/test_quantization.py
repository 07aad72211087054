from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import FormatError
from skymoe.spec.fields import Fields
from skymoe.spec.hf import spec_from_config
from skymoe.spec.quantization import (
    STYLE_OF,
    Fp8Scheme,
    QuantizationSpec,
    QuantizationStyle,
    read_quantization,
    scale_shape,
    write_quantization,
)

# As in the config.json of DeepSeek-V3 and Qwen3-30B-A3B-FP8.
DEEPSEEK = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
QWEN = {
    "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
# As llm-compressor writes FP8_DYNAMIC.
WEIGHTS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "float",
}  # fmt: skip
TOKENS = WEIGHTS | {"dynamic": True, "observer": None, "strategy": "token"}
GROUP = {"input_activations": TOKENS, "output_activations": None, "targets": ["Linear"], "weights": WEIGHTS}
COMPRESSED = {
    "config_groups": {"group_0": GROUP}, "format": "float-quantized", "global_compression_ratio": 1.24,
    "ignore": ["lm_head", "re:.*gate$"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip
# As AutoFP8 wrote it in June 2024.
AUTO_FP8 = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}


def read(section: dict[str, Any] | None) -> QuantizationSpec | None:
    return read_quantization(Fields({"quantization_config": section} if section else {}, "config.json"))


def test_released_configs_are_read() -> None:
    assert read(None) is None
    assert read(DEEPSEEK) == QuantizationSpec(scheme=Fp8Scheme.BLOCK, style=QuantizationStyle.TRANSFORMERS)
    qwen = read(QWEN)
    assert qwen and qwen.not_converted == ("lm_head", "model.layers.0.mlp.gate")
    assert read(COMPRESSED) == QuantizationSpec(
        scheme=Fp8Scheme.CHANNEL,
        style=QuantizationStyle.COMPRESSED_TENSORS,
        not_converted=("lm_head", "re:.*gate$"),
    )
    assert read(AUTO_FP8) == QuantizationSpec(
        scheme=Fp8Scheme.TENSOR, style=QuantizationStyle.AUTO_FP8, not_converted=("lm_head",)
    )
    single = read(DEEPSEEK | {"weight_block_size": None})  # transformers' form of one scale per matrix
    assert single and (single.scheme, single.scale_suffix) == (Fp8Scheme.TENSOR, "_scale_inv")
    other = read(DEEPSEEK | {"weight_block_size": [64, 256]})
    assert other and other.scale_shape((100, 513)) == (2, 3)


@pytest.mark.parametrize(
    ("strategy", "structure", "scheme"),
    [
        ("tensor", None, Fp8Scheme.TENSOR),
        ("channel", None, Fp8Scheme.CHANNEL),
        ("block", [128, 128], Fp8Scheme.BLOCK),
    ],
)
def test_strategies_of_compressed_tensors(strategy: str, structure: list[int] | None, scheme: Fp8Scheme) -> None:
    weights = WEIGHTS | {"strategy": strategy, "block_structure": structure}
    spec = read(COMPRESSED | {"config_groups": {"group_0": GROUP | {"weights": weights}}})
    assert spec and (spec.scheme, spec.scale_suffix) == (scheme, "_scale")


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_what_is_written_is_read_back(scheme: Fp8Scheme) -> None:
    spec = QuantizationSpec(scheme=scheme, style=STYLE_OF[scheme], not_converted=("lm_head", "model.layers.0.mlp.gate"))
    assert read(write_quantization(spec)) == spec


def group(**changes: object) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not read"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"bits": 4}, "quant_method is missing"),
        ({"quant_method": 8}, "quant_method must be a short string"),
        (DEEPSEEK | {"fmt": "e5m2"}, "fmt 'e5m2' is not read"),
        (DEEPSEEK | {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
        (DEEPSEEK | {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        (DEEPSEEK | {"activation_scheme": "magic"}, "activation_scheme"),
        (DEEPSEEK | {"weight_block_size": [128]}, "weight_block_size must be two positive numbers"),
        (DEEPSEEK | {"weight_block_size": [0, 128]}, "weight_block_size"),
        (DEEPSEEK | {"weight_block_size": [128, 10**9]}, "weight_block_size"),
        (DEEPSEEK | {"weight_block_size": "128"}, "weight_block_size"),
        (DEEPSEEK | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
        (COMPRESSED | {"format": "pack-quantized"}, "format 'pack-quantized' is not read"),
        (COMPRESSED | {"format": None}, "format"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED | {"config_groups": {}}, "config_groups is missing or empty"),
        (COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"]}}}, "config_groups.group_0"),
        (group(num_bits=4), "num_bits"),
        (group(type="int"), "type 'int'"),
        (group(strategy="group"), "strategy 'group'"),
        (group(strategy="block"), "block_structure"),
        (group(symmetric=False), "symmetric"),
        (
            COMPRESSED | {"config_groups": {"a": GROUP, "b": GROUP | {"weights": WEIGHTS | {"strategy": "tensor"}}}},
            "in more than one way",
        ),
        ("fp8", "quantization_config must be an object"),
    ],
)
def test_what_is_not_read_is_named(section: Any, told: str) -> None:
    with pytest.raises(FormatError) as error:
        read(section)
    assert told in str(error.value) and "config.json" in str(error.value)


def test_a_model_config_with_fp8_is_a_model_config() -> None:
    config = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    assert spec_from_config(config | {"quantization_config": COMPRESSED}) == spec_from_config(config)
    with pytest.raises(FormatError, match="gptq"):
        spec_from_config(config | {"quantization_config": {"quant_method": "gptq"}})


def test_scale_shapes() -> None:
    assert scale_shape(Fp8Scheme.BLOCK, (129, 128)) == (2, 1)
    assert scale_shape(Fp8Scheme.CHANNEL, (129, 128)) == (129, 1)
    assert scale_shape(Fp8Scheme.TENSOR, (129, 128)) == ()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(base=st.sampled_from([DEEPSEEK, COMPRESSED, AUTO_FP8]), data=st.data())
@settings(max_examples=200, deadline=None)
def test_junk_is_refused_or_read(base: dict[str, Any], data: st.DataObject) -> None:
    """One field of a real config replaced: a spec, or an error of ours."""
    section = {**base, data.draw(st.sampled_from(sorted(base))): data.draw(JUNK)}
    try:
        spec = read(section)
    except FormatError as error:
        assert "config.json" in str(error)
    else:
        assert spec is not None and read(write_quantization(spec)) == spec
