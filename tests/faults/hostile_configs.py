"""Hostile `config.json`: the file, its numbers, and what the numbers would have us build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from faults.hostile_tools import (
    CONFIG,
    VICTIM,
    Build,
    Case,
    edit_json,
    fifo,
    folder,
    link,
    set_field,
    sparse,
    write,
)

CANARY = Path("canary")
NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "rope_theta",
)  # fmt: skip
NOT_NUMBERS = {
    "NaN": "NaN", "Infinity": "Infinity", "1e999": "1e999", "-1": "-1", "0": "0", "true": "true", "text": '"4"',
    "a list": "[4]", "an object": "{}", "5000 digits": "9" * 5000, "code": '"__import__(\'os\').system(\'id\')"',
}  # fmt: skip


def case(make: Build, *says: str, base: str = "dense", refused: str = "model") -> Case:
    return Case(make, base, refused, (CONFIG, *says))


def field(name: str, raw: str, base: str = "dense") -> Case:
    """A field with a value that must be refused, and named."""
    named = _NAMED.get(name) or ("gate_norm" if "gate_norm" in name else name.split(".")[-1])
    parsed = raw not in ("NaN", "Infinity", "1e999") and len(raw) < 4000
    return case(set_field(name, raw), *([named] if parsed else []), base=base)


_NAMED = {"rope_theta": "rope", "rms_norm_eps": "eps", "initializer_range": "init"}


def not_numbers() -> dict[str, Case]:
    cases = {
        f"{name} is {kind}": field(name, raw) for name in NUMBERS for kind, raw in NOT_NUMBERS.items()
        if not (name == "rope_theta" and kind == "an object")
    }  # fmt: skip
    sizes = NUMBERS[:8]
    return cases | {f"{name} is 1e18": field(name, "1e18") for name in sizes} | {
        f"{name} is 2^31 - 1": Case(set_field(name, str(2**31 - 1)), refused="maybe" if "max" in name else "model")
        for name in sizes
    }  # fmt: skip


def changed(base: str = "dense", /, *says: str, refused: str = "model", **fields: Any) -> Case:
    return Case(edit_json(CONFIG, lambda config: config.update(fields)), base, refused, says)


def remote_code(directory: Path) -> None:
    """What transformers would run with trust_remote_code, and by older bugs without it."""
    payload = f"open({str(directory.parent / CANARY)!r}, 'w').close()\nclass M: pass\n"
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "setup.py",
        "conftest.py",
        "sitecustomize.py",
        "torch.py",
    ):
        (directory / name).write_text(payload)
    auto = {"AutoConfig": "configuration_evil.M", "AutoModelForCausalLM": "modeling_evil.M", "AutoModel": "x--y.M"}
    edit_json(CONFIG, lambda config: config.update(auto_map=auto, _attn_implementation="evil/kernels:run"))(directory)


def million_layers(config: dict[str, Any]) -> None:
    config["moe_layers"] = list(range(10**6))


def rope(**scaling: Any) -> Case:
    """Either form of the rotary fields, contradictions left out."""

    def change(config: dict[str, Any]) -> None:
        config.pop("rope_parameters", None)
        config["rope_scaling"] = scaling

    return case(edit_json(CONFIG, change), "rope")


def contradictory_rope(config: dict[str, Any]) -> None:
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}


QUANTIZATIONS: dict[str, Any] = {
    "empty": {}, "text": "fp8", "a list": ["fp8"], "a number": 8, "true": True,
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"load_in_8bit": True, "quant_method": "bitsandbytes"}, "no method": {"bits": 8},
    "a method of code": {"quant_method": "evil/repo:kernel"}, "a method with ESC": {"quant_method": "\x1b[2J"},
    "fp8 on bf16 weights": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "blocks of zero": {"quant_method": "fp8", "weight_block_size": [0, 128]},
    "blocks of -1": {"quant_method": "fp8", "weight_block_size": [-1, -1]},
    "blocks of 2^62": {"quant_method": "fp8", "weight_block_size": [2**62, 2**62]},
    "blocks of text": {"quant_method": "fp8", "weight_block_size": "128"},
    "blocks in three dimensions": {"quant_method": "fp8", "weight_block_size": [1, 2, 3]},
    "a format nobody knows": {"quant_method": "fp8", "fmt": "e9m9", "weight_block_size": [128, 128]},
}  # fmt: skip


CONFIGS = {
    "config missing": case(lambda directory: (directory / CONFIG).unlink()),
    "config empty": case(write(CONFIG, b"")),
    "config null": case(write(CONFIG, b"null"), "object"),
    "config a list": case(write(CONFIG, b"[{}]"), "object"),
    "config text": case(write(CONFIG, b'"llama"'), "object"),
    "config {}": case(write(CONFIG, b"{}"), "model_type"),
    "config of 1 GB": case(sparse(CONFIG, 10**9, b"{"), "larger"),
    "config of 5 MB": case(write(CONFIG, b'{"a":"' + b"x" * 5_000_000 + b'"}'), "larger"),
    "config 100,000 deep": case(write(CONFIG, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
    "config 900 deep in a field nobody reads": case(set_field("extra", "[" * 900 + "]" * 900), "nested"),
    "config UTF-16": case(write(CONFIG, '{"model_type": "llama"}'.encode("utf-16")), "UTF-8"),
    "config with a byte order mark": case(write(CONFIG, b'\xef\xbb\xbf{"model_type": "llama"}')),
    "config with a trailing comma": case(write(CONFIG, b'{"model_type": "llama",}'), "JSON"),
    "config with a comment": case(write(CONFIG, b'{"model_type": "llama" /* hi */}'), "JSON"),
    "config YAML": case(write(CONFIG, b"model_type: !!python/object/apply:os.system ['touch canary']\n"), "JSON"),
    "config with a key twice": case(set_field("twice", '1, "twice": 2'), "twice"),
    "config with a key of ESC twice": case(set_field("a", '1, "\\u001b[2J": 2, "\\u001b[2J": 3'), "twice"),
    "config a FIFO": case(fifo(CONFIG), "regular"),
    "config a directory": case(folder(CONFIG), "regular"),
    "config a link to /dev/zero": case(link(CONFIG, "/dev/zero"), "leads out"),
    "config a link out": case(link(CONFIG, f"../{VICTIM}/{CONFIG}"), "leads out"),
    "config a link to itself": case(link(CONFIG, CONFIG)),
    **not_numbers(),
    "activation code": field("hidden_act", '"__import__(\'os\').system(\'touch canary\')"'),
    "activation gelu": field("hidden_act", '"gelu"'),
    "activation an object": field("hidden_act", "{}"),
    "code beside the weights": Case(remote_code, refused="none"),
    "model_type of 100 kB": field("model_type", json.dumps("x" * 100_000)),
    "model_type clears the screen": field("model_type", '"\\u001b[2J\\u001b]0;owned\\u0007"'),
    "model_type a path": field("model_type", '"../../evil"'),
    "model_type null, no classes": changed("dense", "model_type", model_type=None, architectures=[]),
    "architectures of something else": field("architectures", '["BertForMaskedLM"]'),
    "architectures of 90,000 names": field("architectures", json.dumps(["x"] * 90_000)),
    "architectures clear the screen": field("architectures", '["\\u001b[2J"]'),
    "architectures a number": field("architectures", "7"),
    "architectures of 10^6 names": field("architectures", json.dumps(["LlamaForCausalLM"] * 150_000)),
    "heads that do not divide": changed("dense", num_attention_heads=7),
    "keys that do not divide the heads": changed("dense", "num_kv_heads", num_key_value_heads=2),
    "odd heads": changed("dense", "head_dim", head_dim=5),
    "vocabulary larger than the tensor": changed("dense", "model.embed_tokens.weight", vocab_size=62),
    "vocabulary smaller than the tensor": changed("dense", "model.embed_tokens.weight", vocab_size=60),
    "a layer more than there are": changed("dense", "model.layers.3", num_hidden_layers=4),
    "a layer less": changed("dense", "model.layers.2", num_hidden_layers=2),
    "10,000 layers": changed("dense", num_hidden_layers=10_000),
    "tied, with a head of its own": changed("dense", "lm_head.weight", refused="values", tie_word_embeddings=True),
    "tied is text": field("tie_word_embeddings", '"false"'),
    "biases that are not there": changed("dense", "bias", attention_bias=True),
    "end tokens of 10^6": field("eos_token_id", json.dumps([1] * 10**6)),
    "end token negative": field("eos_token_id", "-5"),
    "a window of -1": field("sliding_window", "-1", base="moe"),
    "layer_types too short": field("layer_types", '["full_attention"]'),
    "layer_types of 10^6": field("layer_types", json.dumps(["full_attention"] * 150_000)),
    "layer_types nobody knows": field("layer_types", '["a", "b", "c"]'),
    "rope of a kind nobody knows": rope(rope_type="evil", factor=2.0),
    "rope of a kind that clears the screen": rope(rope_type="\x1b[2J", factor=2.0),
    "rope factor zero": rope(rope_type="linear", factor=0),
    "rope factor negative": rope(rope_type="dynamic", factor=-4.0),
    "rope factor text": rope(rope_type="linear", factor="4"),
    "rope factor missing": rope(rope_type="linear"),
    "rope original context zero": rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=0),
    "rope betas crossed": rope(rope_type="yarn", factor=2.0, beta_fast=1.0, beta_slow=32.0),
    "rope attention factor negative": rope(rope_type="yarn", factor=2.0, attention_factor=-1.0),
    "rope frequencies crossed": rope(rope_type="llama3", factor=2.0, low_freq_factor=4.0, high_freq_factor=1.0),
    "rope of long lists": rope(rope_type="longrope", short_factor=[1.0] * 10**5, long_factor=[1.0] * 10**5),
    "rope per layer type": rope(full_attention={"rope_type": "default"}, sliding_attention={"rope_type": "default"}),
    "rope text": field("rope_scaling", '"linear"'),
    "rope NaN": field("rope_parameters.rope_theta", "NaN"),
    "rope contradicts itself": case(edit_json(CONFIG, contradictory_rope), "rope"),
    "rope of a part of the head": field("partial_rotary_factor", "0.5"),
    "two billion experts": changed("moe", num_local_experts=2**31 - 1),
    "10^5 experts": changed("moe", "tensors", num_local_experts=100_000),
    "one expert more than there are": changed("moe", "experts.4", num_local_experts=5),
    "experts negative": field("num_local_experts", "-4", base="moe"),
    "more experts per token than there are": changed("moe", "top_k", num_experts_per_tok=9),
    "no expert per token": field("num_experts_per_tok", "0", base="moe"),
    "experts wider than their tensors": changed("moe", "w1", intermediate_size=2**20),
    "gate norm scale NaN": field("gate_norm_scale", "NaN", base="skymoe"),
    "gate norm scale negative": field("gate_norm_scale", "-1", base="skymoe"),
    "gate norm scale zero": field("gate_norm_scale", "0", base="skymoe"),
    "gate norm scale text": field("gate_norm_scale", '"1"', base="skymoe"),
    "gate norm ddof 7": field("gate_norm_ddof", "7", base="skymoe"),
    "gate norm eps 2": field("gate_norm_eps", "2", base="skymoe"),
    "gate norm text": field("gate_norm", '"yes"', base="skymoe"),
    "moe_layers of 10^6": case(edit_json(CONFIG, million_layers), base="skymoe"),
    "moe_layers of 150,000": field("moe_layers", json.dumps([1] * 150_000), base="skymoe"),
    "moe_layers out of range": field("moe_layers", "[0, 99]", base="skymoe"),
    "moe_layers twice": field("moe_layers", "[1, 1]", base="skymoe"),
    "moe_layers negative": field("moe_layers", "[-1]", base="skymoe"),
    "moe_layers text": field("moe_layers", '"all"', base="skymoe"),
    "moe_layers empty": changed("skymoe", moe_layers=[]),
    "shared expert of -1": field("shared_expert_intermediate_size", "-1", base="skymoe"),
    "shared expert that is not there": changed("skymoe", "shared_expert", shared_expert_intermediate_size=8),
    "dropout": field("attention_dropout", "0.5"),
    "dropout true": field("attention_dropout", "true"),
    **{
        f"quantization {name}": changed(quantization_config=value)
        for name, value in QUANTIZATIONS.items()
    },
}  # fmt: skip
