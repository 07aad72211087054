"""config.json to ModelSpec and back; every field's bad values."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError, FormatError
from skymoe.spec.hf import config_from_spec, generation_config, read_config, spec_from_config, unread_fields
from skymoe.spec.hf_families import FAMILIES, carried, uncarried
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec, QkNorm, RopeScaling, RopeSpec
from skymoe.spec.presets import PRESETS

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 3}
SKYWORK = LLAMA | {"model_type": "skywork", "architectures": ["SkyworkForCausalLM"]}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 3}
MOE = MoESpec(num_experts=5, top_k=2, ffn_size=40, gate_norm=GateNormSpec(scale=2.0, ddof=0, eps=0.0))
ODD = ModelSpec(
    architecture=Architecture.SKYMOE,
    vocab_size=97,
    hidden_size=48,
    num_layers=4,
    ffn_size=200,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    max_position=77,
    norm_eps=1e-5,
    rope=RopeSpec(
        theta=1e6, scaling=RopeScaling.YARN, factor=4.0, original_max_position=20, mscale=0.5, truncate=False
    ),
    tie_embeddings=True,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=QkNorm.HEAD,
    sliding_window=9,
    sliding_layers=(0, 2),
    moe=replace(MOE, expert_bias=True, norm_topk=False, shared_ffn_size=12),
    moe_layers=(1, 3),
    bos_id=0,
    eos_ids=(3, 4),
    pad_id=5,
    init_std=0.01,
)


def round_trip(spec):
    return spec_from_config(json.loads(json.dumps(config_from_spec(spec))))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name):
    assert round_trip(PRESETS[name]) == PRESETS[name]


def test_skymoe_carries_everything():
    assert round_trip(ODD) == ODD
    assert round_trip(replace(ODD, moe=None, moe_layers=None)) == replace(ODD, moe=None, moe_layers=None)
    assert round_trip(replace(ODD, moe=replace(MOE, gate_norm=None))).moe.gate_norm is None
    assert round_trip(replace(ODD, sliding_window=None, sliding_layers=None)).sliding_window is None


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(theta=12345.5),
        RopeSpec(scaling=RopeScaling.LINEAR, factor=3.0),
        RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2.0),
        RopeSpec(scaling=RopeScaling.LLAMA3, factor=8.0, original_max_position=50, high_freq_factor=5.0),
        RopeSpec(scaling=RopeScaling.YARN, factor=8.0, attention_factor=1.2, beta_fast=16.0, mscale_all_dim=1.0),
    ],
)
def test_rope_is_written_twice_and_read_from_either(rope):
    spec = replace(PRESETS["demo-dense"], rope=rope)
    config = config_from_spec(spec)
    assert spec_from_config(config) == spec
    new_only = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    old_only = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert spec_from_config(new_only) == spec
    assert spec_from_config(old_only) == spec
    if rope.scaling is not RopeScaling.NONE:
        old_only["rope_scaling"]["type"] = old_only["rope_scaling"].pop("rope_type")  # before transformers 4.43
        assert spec_from_config(old_only) == spec


@pytest.mark.parametrize("architecture", [a for a in Architecture if a is not Architecture.SKYMOE])
def test_no_other_architecture_pretends_to_carry_the_odd_one(architecture):
    spec = replace(ODD, architecture=architecture)
    assert uncarried(spec)
    with pytest.raises(ConfigError, match="cannot carry"):
        config_from_spec(spec)
    fallback, reasons = carried(spec)
    assert fallback == ODD
    assert reasons == uncarried(spec)
    assert carried(ODD) == (ODD, ())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama-3-8b", {"qkv_bias": True}, "all attention biases or none"),
        ("llama-3-8b", {"qk_norm": QkNorm.HEAD}, "no q/k norm"),
        ("llama-3-8b", {"sliding_window": 8}, "no sliding window"),
        ("llama-3-8b", {"moe": MOE}, "has no experts"),
        ("mistral-7b", {"o_bias": True}, "no output-projection bias"),
        ("mistral-7b", {"sliding_layers": (3, 4)}, "in every layer or in none"),
        ("qwen2.5-7b", {"qkv_bias": False}, "always has q/k/v biases"),
        ("qwen3-8b", {"qk_norm": None}, "always has q/k norm"),
        ("qwen3-8b", {"qk_norm": QkNorm.FULL}, "q/k norm of form head"),
        ("olmoe-1b-7b", {"qk_norm": QkNorm.HEAD}, "q/k norm of form full"),
        ("olmoe-1b-7b", {"head_dim": 64}, "heads of hidden_size / num_attention_heads"),
        ("olmoe-1b-7b", {"sliding_window": 8}, "no sliding window"),
        ("olmoe-1b-7b", {"qkv_bias": True}, "all attention biases or none"),
        ("olmoe-1b-7b", {"moe": replace(MOE, gate_norm=None), "moe_layers": (1,)}, "experts in every layer"),
        ("llama-3-8b", {"hidden_size": 4097}, "heads of hidden_size"),
        ("skywork-13b", {"head_dim": 64}, "heads of hidden_size"),
        ("mixtral-8x7b", {"moe_layers": (1,)}, "experts in every layer"),
        ("mixtral-8x7b", {"moe": replace(MOE, gate_norm=None, norm_topk=False)}, "always renormalizes"),
        ("mixtral-8x7b", {"moe": MOE}, "no gate normalization"),
        ("mixtral-8x7b", {"moe": None}, "needs experts"),
        ("skywork-moe", {"moe": MOE}, "ddof=1"),
        ("qwen3-30b-a3b", {"moe": replace(MOE, gate_norm=None, shared_ffn_size=4)}, "no shared expert"),
        ("qwen3-30b-a3b", {"moe": replace(MOE, gate_norm=None, expert_bias=True)}, "no expert bias"),
        ("demo-dense", {"rope": RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2.0, original_max_position=3)}, "dynamic"),
    ],
)
def test_what_a_format_cannot_carry_is_said(name, changes, reason):
    assert any(reason in told for told in uncarried(replace(PRESETS[name], **changes)))


# ---- reading


def test_a_minimal_llama_takes_the_defaults_of_its_class():
    spec = spec_from_config(LLAMA)
    assert (spec.num_kv_heads, spec.head_dim, spec.max_position) == (3, 16, 2048)
    assert (spec.norm_eps, spec.rope, spec.tie_embeddings) == (1e-6, RopeSpec(), False)
    assert spec_from_config({**LLAMA, "model_type": None}) == spec  # the class name says it


def test_skywork_moe_fields_are_read_by_value():
    moe = SKYWORK | {"num_experts": [16], "num_experts_per_tok": 2, "moe_2layer_gate": False}
    assert spec_from_config(SKYWORK).architecture is Architecture.SKYWORK
    assert spec_from_config(moe).architecture is Architecture.SKYWORK_MOE
    assert spec_from_config(moe).moe == MoESpec(num_experts=16, top_k=2, ffn_size=200)
    assert spec_from_config(moe | {"moe_use_logits_norm": False, "moe_gate_norm_std": 2.0}).moe.gate_norm is None
    norm = spec_from_config(moe | {"moe_use_logits_norm": True, "moe_gate_norm_std": 2.0}).moe.gate_norm
    assert norm == GateNormSpec(scale=2.0, ddof=1, eps=0.0, subtract_mean=False)
    assert spec_from_config(moe | {"num_experts": [16, 16]}).moe.num_experts == 16
    for bad in ({"num_experts": [16, 8]}, {"moe_2layer_gate": True}, {"moe_expert_interval": 2}, {"num_experts": []},
                {"moe_use_mixtral_gating": False, "moe_feature_no_mul_topk": False}):  # fmt: skip
        with pytest.raises(FormatError):
            spec_from_config(moe | bad)


def test_windows_and_layer_types():
    windowed = QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    assert spec_from_config(windowed).window(0) is None
    assert spec_from_config(windowed).window(1) == 7
    assert spec_from_config(windowed | {"use_sliding_window": False}).sliding_window is None
    assert spec_from_config(windowed | {"max_window_layers": 3}).sliding_window is None
    full, slide = "full_attention", "sliding_attention"
    assert spec_from_config(windowed | {"layer_types": [full, full, slide]}).sliding_layers == (2,)
    assert spec_from_config(windowed | {"layer_types": [full] * 3}).sliding_window is None
    assert spec_from_config(windowed | {"layer_types": [slide, full, slide]}).sliding_layers == (0, 2)
    assert spec_from_config(windowed | {"layer_types": [slide] * 3}).sliding_layers is None
    for kinds in ([full, slide], [full, full, "chunked_attention"], "full", [1, 2, 3]):
        with pytest.raises(FormatError, match="layer_types"):
            spec_from_config(windowed | {"layer_types": kinds})
    with pytest.raises(FormatError, match="layer_types"):
        spec_from_config(QWEN2 | {"layer_types": [full, full, slide]})
    mistral = MIXTRAL | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert spec_from_config(mistral).sliding_window == 4096  # the default of the class
    assert spec_from_config(mistral | {"sliding_window": None}).sliding_window is None
    with pytest.raises(FormatError, match="layer_types"):
        spec_from_config(mistral | {"layer_types": [full] * 3})


def test_special_tokens():
    spec = spec_from_config(LLAMA | {"bos_token_id": 0, "eos_token_id": [2, 3], "pad_token_id": -1})
    assert (spec.bos_id, spec.eos_ids, spec.pad_id) == (0, (2, 3), None)
    assert generation_config(spec) == {"bos_token_id": 0, "eos_token_id": [2, 3]}
    assert spec_from_config(LLAMA | {"eos_token_id": 7}).eos_ids == (7,)
    for bad in ("2", [1.5], [-2], True, {"a": 1}):
        with pytest.raises(FormatError, match="eos_token_id"):
            spec_from_config(LLAMA | {"eos_token_id": bad})


COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("name", [*COUNTS, "num_key_value_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 1e18, 10**400, 1.5, NAN, INFINITY, True, "48", [48], {"a": [1]}])
def test_bad_counts_are_refused_by_name(name, value):
    with pytest.raises(FormatError, match=f"some.json: {name} must be"):
        spec_from_config(LLAMA | {name: value}, where="some.json")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("missing", ["absent", "null"])
def test_missing_counts_are_named(name, missing):
    config = {key: value for key, value in LLAMA.items() if key != name} | ({name: None} if missing == "null" else {})
    with pytest.raises(FormatError, match=f"config.json: {name} is missing"):
        spec_from_config(config)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", [-1.0, 0, NAN, -INFINITY, 10**400, "1e-5", False, [], {}])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(FormatError, match="config.json"):
        spec_from_config(LLAMA | {name: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"'longrope' is not supported[\s\S]*yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be >= 1"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "different"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"router_jitter_noise": 0.01}, "router_jitter_noise must be 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"num_attention_heads": 5}, "head_dim is missing"),
        ({"num_key_value_heads": 2}, "not a multiple"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_hidden_layers": 2_000_000}, "num_hidden_layers must be at most"),
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, r"'gemma' is not supported[\s\S]*qwen3_moe"),
        ({"model_type": None, "architectures": None}, r"model_type is missing[\s\S]*llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only causal language models"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"model_type": 5}, "model_type must be a short string"),
        ({"model_type": "\x1b[31mred"}, "not supported"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(changes, told):
    with pytest.raises(FormatError, match=told) as caught:
        spec_from_config(LLAMA | changes)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (MIXTRAL | {"num_local_experts": 0}, "num_local_experts must be between"),
        (MIXTRAL | {"num_local_experts": [8]}, "num_local_experts must be a whole number"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "top_k 9 is more than the 8 experts"),
        (QWEN2 | {"model_type": "qwen2_moe", "num_experts_per_tok": 2}, "num_local_experts is missing"),
        ({k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}, "num_key_value_heads is missing"),
    ],
)
def test_bad_experts(config, told):
    with pytest.raises(FormatError, match=told):
        spec_from_config(config)


def test_sparse_steps_and_dense_layers():
    config = QWEN2 | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    assert spec_from_config(config).moe_layers is None
    assert spec_from_config(config | {"decoder_sparse_step": 2}).moe_layers == (1,)
    assert spec_from_config(config | {"mlp_only_layers": [0, 2]}).moe_layers == (1,)
    assert spec_from_config(config | {"mlp_only_layers": [0, 1, 2]}).moe_layer_ids == ()


def test_unknown_fields_are_harmless():
    assert spec_from_config(LLAMA | {"pretraining_tp": 2, "nonsense": {"deep": [1]}}) == spec_from_config(LLAMA)


def test_fields_that_nobody_reads_are_listed():
    rope = {"type": "linear", "factor": 2.0, "finetuned": True}
    extra = {"use_cache": False, "auto_map": {"AutoModel": "evil.Model"}, "torch_dtype": "bfloat16", "nothing": None}
    config = LLAMA | extra | {"rope_scaling": rope, "pretraining_tp": 2, "nonsense": {"deep": [1]}, "long": "x" * 9000}
    listed = unread_fields(config)
    assert listed == {
        "long": "(9002 characters)",
        "nonsense": {"deep": [1]},
        "pretraining_tp": 2,
        "rope_scaling.finetuned": True,
    }
    hostile = unread_fields(LLAMA | {f"\x1b[31m{'n' * 500}{i}": i for i in range(5000)})
    assert len(json.dumps(hostile)) < 20_000
    assert "\x1b" not in "".join(hostile)
    assert unread_fields(config_from_spec(ODD)) == {}


def test_clipping_and_windows_that_a_class_lacks_are_refused():
    for bad in ({"clip_qkv": 8.0}, {"sliding_window": 7}, {"layer_types": ["sliding_attention"] * 3}):
        for base in (LLAMA, LLAMA | {"model_type": "olmoe"}, SKYWORK):
            with pytest.raises(FormatError, match=next(iter(bad))):
                spec_from_config(base | bad)
    unused = {"sliding_window": 7, "use_sliding_window": False, "clip_qkv": None}
    assert spec_from_config(LLAMA | unused) == spec_from_config(LLAMA)


def test_the_form_of_the_qk_norm_is_read_by_name():
    config = config_from_spec(ODD)
    assert spec_from_config(config | {"qk_norm": "full"}).qk_norm is QkNorm.FULL
    assert spec_from_config(config | {"qk_norm": None}).qk_norm is None
    assert spec_from_config(config | {"qk_norm": True}).qk_norm is QkNorm.HEAD  # files from before the second form
    assert spec_from_config(config | {"qk_norm": False}).qk_norm is None
    for bad in ("heads", 1, ["full"]):
        with pytest.raises(FormatError, match="qk_norm must be"):
            spec_from_config(config | {"qk_norm": bad})
    with pytest.raises(ConfigError, match="qk_norm"):
        replace(ODD, qk_norm=True)


def test_two_contexts_before_stretching_are_refused():
    inner = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    name = "original_max_position_embeddings"
    outer = LLAMA | {"rope_scaling": inner, name: 16}
    assert spec_from_config(outer).rope.original_max_position == 16
    with pytest.raises(FormatError, match=f"rope_scaling.{name} is 32, but the model's is 16"):
        spec_from_config(outer | {"rope_scaling": inner | {name: 32}})


def test_olmoe_takes_the_defaults_of_its_class():
    spec = spec_from_config(LLAMA | {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]})
    assert spec.moe == MoESpec(num_experts=64, top_k=8, ffn_size=200, norm_topk=False, aux_loss_coef=0.01)
    assert (spec.qk_norm, spec.norm_eps, spec.max_position) == (QkNorm.FULL, 1e-5, 4096)
    assert (spec.bos_id, spec.eos_ids, spec.pad_id) == (None, (50279,), 1)
    assert spec_from_config(LLAMA | {"model_type": "olmoe", "num_local_experts": 9}).moe.num_experts == 9


# ---- the file


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "not a JSON number"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"x": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "larger than"),
    ],
)
def test_a_config_file_is_read_strictly(content, told, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=told) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_a_config_that_is_no_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_config(tmp_path)


ROPE_KEYS = ["rope_scaling", "rope_parameters", "rope_type", "type", "factor", "rope_theta", "low_freq_factor",
             "high_freq_factor", "original_max_position_embeddings", "beta_fast", "mscale"]  # fmt: skip
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["silu", "linear", "yarn", "llama3", "full_attention", "sliding_attention", 10**400, 1e18, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sampled_from([LLAMA, MIXTRAL, SKYWORK, QWEN2, *map(config_from_spec, (ODD, PRESETS["skywork-moe"]))]),
    model_type=st.sampled_from(sorted({family.model_type for family in FAMILIES.values()})),
    data=st.data(),
)
def test_any_junk_gives_a_spec_or_a_format_error(base, model_type, data):
    config = dict(base) | {"model_type": model_type, "num_experts": 4, "moe_intermediate_size": 8}
    more = ("layer_types", "sliding_window", "mlp_only_layers", "use_sliding_window", "moe_layers", "max_window_layers",
            "qk_norm", "clip_qkv", "router_aux_loss_coef", "output_router_logits", "bos_token_id")  # fmt: skip
    names = st.sampled_from(sorted({*config, *ROPE_KEYS, *more}))
    config |= data.draw(st.dictionaries(names, JUNK, max_size=4))
    try:
        spec = spec_from_config(config)
    except FormatError as error:
        assert "config.json" in str(error)
        assert len(str(error)) < 3000
        return
    target, _ = carried(spec)
    assert round_trip(target) == target
    assert len(json.dumps(unread_fields(config))) < 100_000
