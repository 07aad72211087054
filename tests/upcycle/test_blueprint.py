"""Requests: what presets and methods fill in, and what is refused with a way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skymoe.base.config import check_config
from skymoe.base.errors import ConfigError
from skymoe.spec.presets import PRESETS
from skymoe.upcycle.blueprint import draw_blueprint
from skymoe.upcycle.config import UpcycleConfig

LLAMA = PRESETS["llama-3-8b"]  # ffn 14336, 32 layers
MIXTURE = PRESETS["skywork-moe"]  # 16 experts, top-2, gate normalization


def draw(*specs, **options):
    names = [f"s{number}" for number in range(len(specs) or 1)]
    config = check_config(UpcycleConfig, {"sources": names, "out": "o", **options})
    return draw_blueprint(config, specs or (LLAMA,))


@pytest.mark.parametrize(
    ("options", "experts", "top_k", "ffn_size", "gate_norm"),
    [
        ({}, 8, 2, 14336, False),
        ({"preset": "skywork"}, 16, 2, 14336, True),
        ({"preset": "portable"}, 8, 2, 14336, False),
        ({"preset": "skywork", "experts": 4, "gate_norm": False}, 4, 2, 14336, False),
        ({"preset": "skywork", "top_k": 1}, 16, 1, 14336, True),
        ({"method": "virtual_group"}, 64, 8, 1792, False),  # E8 G8 T8 of He et al.
        ({"method": "virtual_group", "granularity": 4, "expansion": 2}, 8, 4, 3584, False),
        ({"method": "virtual_group", "granularity": 4, "experts": 32}, 32, 4, 3584, False),
        ({"method": "virtual_group", "granularity": 4, "preset": "skywork"}, 16, 2, 3584, True),
        ({"method": "virtual_group", "shared": "split", "shared_shards": 4, "expansion": 2}, 8, 4, 1792, False),
        ({"method": "partition", "experts": 16, "top_k": 4}, 16, 4, 896, False),
    ],
)
def test_what_is_not_given_is_filled_in(options, experts, top_k, ffn_size, gate_norm):
    moe = draw(**options).moe
    assert (moe.num_experts, moe.top_k, moe.ffn_size, moe.gate_norm is not None) == (
        experts,
        top_k,
        ffn_size,
        gate_norm,
    )


def test_clones_by_default_twice_and_as_many_times_top_k():
    assert draw(MIXTURE, method="duplicate").moe.top_k == 4
    assert draw(MIXTURE, method="duplicate", experts=48).moe.top_k == 6
    odd = draw(MIXTURE, method="duplicate", experts=24)
    assert (odd.moe.top_k, odd.router_noise, odd.clones) == (2, 0.01, 1.5)
    assert odd.moe.gate_norm == MIXTURE.moe.gate_norm
    assert draw(MIXTURE, method="duplicate", gate_norm=True).moe.gate_norm is not None


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, None),
        ({"layer_interval": 1}, None),
        ({"last_layers": 32}, None),
        ({"layers": [0, 31]}, (0, 31)),
        ({"layer_interval": 8}, (7, 15, 23, 31)),
        ({"last_layers": 3}, (29, 30, 31)),
    ],
)
def test_mixed_layers(options, layers):
    for method in ("copy", "drop", "noise", "virtual_group", "partition"):
        assert draw(**options, method=method).layers == layers
    assert draw(LLAMA, LLAMA, **options, method="specialists").layers == layers


def test_experts_of_specialists_go_round():
    assert draw(LLAMA, LLAMA, LLAMA, method="specialists").assign == (0, 1, 2, 0, 1, 2, 0, 1)
    skywork = draw(*[LLAMA] * 4, method="specialists", assign=[1, 1, 1, 2, 2, 2, 3, 0])  # 3 cn, 3 en, 1 code, 1 base
    assert skywork.moe.num_experts == 8
    assert draw(LLAMA, LLAMA, method="specialists", assign=[0, 1, 1], preset="skywork").moe.num_experts == 3
    assert draw(LLAMA, LLAMA, method="specialists", assign=[1, 1]).assign == (1, 1)  # the base gives the rest


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_k": 9}, r"top_k is 9, but there are only 8 experts[\s\S]*--top-k 8"),
        ({"preset": "skywork", "top_k": 17}, "only 16 experts"),
        ({"method": "virtual_group", "granularity": 6}, r"does not divide the 14336[\s\S]*one of 2, 4, 7, 8"),
        ({"method": "virtual_group", "granularity": 4, "experts": 6}, r"no multiple of the 4[\s\S]*--experts 8"),
        ({"method": "virtual_group", "granularity": 4, "experts": 8, "expansion": 3}, "expansion x shards is 3 x 4"),
        ({"method": "virtual_group", "shared": "split", "shared_shards": 8}, "none is left"),
        ({"method": "virtual_group", "shared": "split", "weight_scale": "he2024"}, "weight_scale=exact"),
        ({"method": "partition", "experts": 10}, r"does not divide[\s\S]*one of 4, 7, 8, 14"),
        ({"layers": [0, 32]}, r"layer 32, the model has 32[\s\S]*0 to 31"),
        ({"layers": [-1]}, "layer -1"),
        ({"layer_interval": 33}, "none would become MoE"),
        ({"last_layers": 33}, "the model has 32"),
        ({"method": "duplicate"}, r"is dense \(llama\)[\s\S]*--method copy"),
        ({"method": "specialists"}, r"one source is given[\s\S]*--method copy"),
    ],
)
def test_impossible_requests_name_a_way_out(options, told):
    with pytest.raises(ConfigError, match=told):
        draw(**options)


@pytest.mark.parametrize(
    ("specs", "options", "told"),
    [
        ([LLAMA, LLAMA], {}, r"2 sources are given, method copy starts from one[\s\S]*specialists"),
        ([LLAMA] * 9, {"method": "specialists"}, r"no expert comes from source 8[\s\S]*at least 9 experts"),
        ([LLAMA] * 3, {"method": "specialists", "assign": [0, 1, 1]}, "no expert comes from source 2"),
        ([LLAMA] * 2, {"method": "specialists", "assign": [0, 2]}, r"source 2, there are 2[\s\S]*0 to 1"),
        ([LLAMA] * 2, {"method": "specialists", "assign": [0, 1], "experts": 3}, "for 2 experts, experts is 3"),
        ([LLAMA, replace(LLAMA, ffn_size=7)], {"method": "specialists"}, "s1: ffn_size is 7, but 14336 in s0"),
        ([LLAMA, replace(LLAMA, norm_eps=1e-6)], {"method": "specialists"}, "norm_eps is 1e-06, but 1e-05 in s0"),
        ([LLAMA, replace(LLAMA, rope=replace(LLAMA.rope, theta=9.0))], {"method": "specialists"}, "rope.theta is 9.0"),
        ([MIXTURE], {}, r"already a mixture of experts[\s\S]*--method duplicate[\s\S]*dense parent"),
        ([MIXTURE], {"method": "duplicate", "experts": 16}, r"has 16 already[\s\S]*--experts 32"),
        ([MIXTURE], {"method": "duplicate", "gate_norm": False}, "gate_norm asks for a gate without"),
        ([MIXTURE], {"method": "duplicate", "preset": "portable", "experts": 32}, "preset portable asks for a gate wi"),
        ([PRESETS["mixtral-8x7b"]], {"method": "duplicate", "preset": "skywork"},
         r"preset skywork asks for a normalized gate, the model has a gate without[\s\S]*leave the preset out"),
        ([replace(LLAMA, mlp_bias=True)], {}, "mlp_bias"),
    ],
)  # fmt: skip
def test_parents_that_do_not_fit(specs, options, told):
    with pytest.raises(ConfigError, match=told):
        draw(*specs, **options)


def test_a_preset_that_agrees_with_the_gate_of_a_mixture():
    made = draw(PRESETS["mixtral-8x7b"], method="duplicate", preset="portable", experts=16)
    assert (made.moe.num_experts, made.moe.gate_norm) == (16, None)
    told = draw(PRESETS["mixtral-8x7b"], method="duplicate", preset="skywork", gate_norm=False)
    assert (told.moe.num_experts, told.moe.gate_norm) == (16, None)  # what is given beside a preset wins


def test_specialists_may_differ_in_their_special_tokens():
    assert draw(LLAMA, replace(LLAMA, eos_ids=(5,), pad_id=3), method="specialists").moe.num_experts == 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 0.3}, "ratio belongs to method drop, not to copy"),
        ({"method": "drop", "granularity": 4}, "granularity belongs to method virtual_group, not to drop"),
        ({"method": "duplicate", "router_init": "uniform"}, "router_init is the parent's"),
        ({"method": "duplicate", "layers": [1]}, "layers is the parent's"),
        ({"shared": "split"}, "must be virtual_group"),
        ({"method": "virtual_group", "shared_shards": 2}, "belongs to shared=split"),
        ({"gate_scale": 2.0}, "gate_scale belongs to gate_norm, which is off"),
        ({"preset": "skywork", "gate_norm": False, "gate_eps": 0.0}, "which is off"),
        ({"method": "duplicate", "gate_ddof": 0}, "gate_ddof is the parent's"),
        ({"layers": [1], "last_layers": 1}, "one of layers, layer_interval and last_layers"),
        ({"layers": [2, 1]}, "ascending"),
        ({"experts": 1}, "experts"),
        ({"router_std": 0}, "router_std"),
        ({"method": "magic"}, "copy"),
        ({"dtype": "int8"}, "dtype"),
        ({"method": "drop", "ratio": 0}, "ratio"),
        ({"method": "virtual_group", "weight_scale": -2}, "weight_scale"),
        ({"preset": "huge"}, "preset"),
        ({"sources": []}, "sources"),
    ],
)
def test_options_that_contradict_each_other(options, told):
    with pytest.raises(ConfigError, match=told):
        draw(**options)


def test_the_record_has_what_the_method_reads_and_no_path():
    config = check_config(UpcycleConfig, {"sources": ["/secret/s"], "out": "/secret/o", "method": "drop", "seed": 4})
    told = config.told()
    assert (told["method"], told["ratio"], told["seed"]) == ("drop", 0.5, 4)
    assert not {"sources", "out", "granularity", "assign", "noise_std", "layers"} & set(told)
    assert "secret" not in str(told)
    again = check_config(UpcycleConfig, {"sources": ["s"], "out": "o", **told})
    assert again.told() == told
