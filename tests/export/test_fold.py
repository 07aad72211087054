"""Folding gate normalization: the fit is the minimum, the choice of experts stays, the cost is told or refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from export.models import NORMED, TOKENS, random_directory, request, with_moe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from skymoe.base.errors import ConfigError, FormatError
from skymoe.convert.streamed import RouterInput
from skymoe.convert.text import TEXT
from skymoe.data.tokenizer import train_tokenizer
from skymoe.export.fold import best_temperature, fold_layer, folded_router
from skymoe.export.run import dry_run, run
from skymoe.model.load import load
from skymoe.ops.routing import route
from skymoe.spec.model import GateNormSpec, ModelSpec

pytest.importorskip("tokenizers")
SPEC = replace(with_moe(NORMED, gate_norm=GateNormSpec()), vocab_size=300, max_position=128, init_std=0.05)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 280)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(spec: ModelSpec = SPEC, **options):
        path = random_directory(tmp_path / "source", spec, **options)
        tokenizer.save(path)
        return path

    return make


def mean_kl(p_TK, z_TK, c):
    return (p_TK * (p_TK.log() - (c * z_TK).log_softmax(-1))).sum(-1).mean()


def random_layer(seed=0, tokens=400, experts=8, top_k=3, norm=None, norm_topk=True):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 24, generator=generator) * (0.2 + torch.rand(tokens, 1, generator=generator))
    weight_ED = 0.3 * torch.randn(experts, 24, generator=generator) + 2.0
    assert SPEC.moe is not None
    moe = replace(SPEC.moe, num_experts=experts, top_k=top_k, norm_topk=norm_topk, gate_norm=norm or GateNormSpec())
    return RouterInput(0, x_TD, x_TD @ weight_ED.T), weight_ED, moe


# ---- the fit


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_no_other_temperature_is_better(seed, width, tokens):
    generator = torch.Generator().manual_seed(seed)
    z_TK = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    factor_T = 0.2 + 3 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    p_TK = (factor_T[:, None] * z_TK).softmax(-1)
    best = best_temperature(p_TK, z_TK, factor_T)
    assert factor_T.min() <= best <= factor_T.max()
    least = mean_kl(p_TK, z_TK, best)
    for other in (*torch.linspace(0.05, 4, 80).tolist(), best * 0.999, best * 1.001):
        assert least <= mean_kl(p_TK, z_TK, other) + 1e-12


def test_where_all_tokens_have_one_deviation_the_fold_is_exact():
    z_TK = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor_T = torch.full((50,), 1.7, dtype=torch.float64)
    p_TK = (1.7 * z_TK).softmax(-1)
    assert best_temperature(p_TK, z_TK, factor_T) == 1.7
    assert mean_kl(p_TK, z_TK, 1.7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("norm", [GateNormSpec(), GateNormSpec(scale=2.5, ddof=0, eps=0.0, subtract_mean=False)])
@pytest.mark.parametrize(("top_k", "norm_topk"), [(2, True), (8, True), (3, False)])
def test_the_folded_router_chooses_the_same_experts(norm, top_k, norm_topk):
    inputs, weight_ED, moe = random_layer(top_k=top_k, norm=norm, norm_topk=norm_topk)
    layer = fold_layer(inputs, weight_ED, moe)
    before = route(inputs.logits_TE, top_k=top_k, gate_norm=norm, norm_topk=norm_topk)
    folded_ED = folded_router(weight_ED, layer.temperature)
    after = route(inputs.x_TD @ folded_ED.T, top_k=top_k, norm_topk=norm_topk)
    assert torch.equal(before.expert_ids_TK.sort(-1).values, after.expert_ids_TK.sort(-1).values)
    assert layer.same_experts == 1.0
    assert layer.temperature > 0
    assert folded_ED.mean(0).abs().max() < 1e-6
    if norm_topk:
        order = torch.equal(before.expert_ids_TK, after.expert_ids_TK)
        assert order
        assert layer.mean_abs_dweight == pytest.approx(
            float((before.weights_TK - after.weights_TK).abs().mean()), rel=1e-3
        )
    assert layer.true_low < layer.true_median < layer.true_high


def test_a_token_without_a_preference_does_not_spoil_the_fit():
    inputs, weight_ED, moe = random_layer(norm=GateNormSpec(eps=0.0))
    plain = fold_layer(inputs, weight_ED, moe)
    x_TD = torch.cat((inputs.x_TD, torch.zeros(1, 24)))
    with_constant = fold_layer(RouterInput(0, x_TD, x_TD @ weight_ED.T), weight_ED, moe)
    assert with_constant.temperature == pytest.approx(plain.temperature, rel=1e-6)


# ---- the command's work


def test_a_folded_model_is_a_plain_mixtral_that_says_what_it_cost(make, text, oracle, tmp_path):
    source = make()
    report = run(request(source, tmp_path / "out", "mixtral", fold_gate_norm=True, text=str(text)))
    assert (report.architecture, report.exact) == ("mixtral", False)
    assert "depends on the token" in report.reason
    fold = report.fold
    assert [layer.layer for layer in fold.layers] == [0, 1, 2]
    assert 0 < fold.kl < fold.max_kl
    assert fold.perplexity_after == pytest.approx(fold.perplexity_before, rel=0.05)
    assert fold.fit_tokens >= 3 * fold.held_out_tokens > 0
    assert all(0 < layer.mean_abs_dweight < 0.1 and layer.same_experts == 1 for layer in fold.layers)
    told = json.loads((tmp_path / "out" / "fold.json").read_text())
    assert told["layers"][1]["temperature"] == fold.layers[1].temperature
    assert "held-out tokens" in (tmp_path / "out" / "README.md").read_text()
    assert not json.loads((tmp_path / "out" / "receipt.json").read_text())["exact"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    weight_ED = before["model.layers.1.mlp.gate.weight"]
    expected_ED = fold.layers[1].temperature * (weight_ED - weight_ED.mean(0))
    torch.testing.assert_close(after["model.layers.1.block_sparse_moe.gate.weight"], expected_ED)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(before[name], after[name])
    with torch.no_grad():
        ours = load(tmp_path / "out")(TOKENS)
    torch.testing.assert_close(ours, oracle.logits(tmp_path / "out", TOKENS), rtol=0, atol=1e-4)


def test_the_same_again_is_the_same_bits_and_bf16_keeps_its_routers_in_fp32(make, text, tmp_path):
    source = make()
    options = {"fold_gate_norm": True, "text": str(text), "dtype": "bfloat16", "max_kl": 1.0}
    for name in ("a", "b"):
        run(request(source, tmp_path / name, "qwen2_moe", **options))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name for name in a if a[name].dtype == torch.float32} == {
        f"model.layers.{i}.mlp.gate.weight" for i in range(3)
    }


def test_not_renormalized_gates_fold_into_qwen(make, text, oracle, tmp_path):
    source = make(with_moe(SPEC, norm_topk=False))
    report = run(request(source, tmp_path / "out", "qwen2_moe", fold_gate_norm=True, text=str(text), max_kl=1.0))
    assert len(report.adapters) == 2
    with torch.no_grad():
        ours = load(tmp_path / "out")(TOKENS)
    torch.testing.assert_close(ours, oracle.logits(tmp_path / "out", TOKENS), rtol=0, atol=1e-4)


def test_a_fold_that_changes_too_much_is_refused_and_leaves_nothing(make, text, tmp_path):
    source = make()
    with pytest.raises(
        ConfigError, match=r"changes the model too much: KL [\s\S]*max_kl[\s\S]*--format skymoe is exact"
    ) as told:
        run(request(source, tmp_path / "out", "mixtral", fold_gate_norm=True, text=str(text), max_kl=1e-12))
    assert told.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_a_dry_run_does_not_fit(make, tmp_path):
    planned = dry_run(request(make(), tmp_path / "out", "mixtral", fold_gate_norm=True, text="no such file"))
    assert not planned.exact
    assert sum("times a fit" in line for line in planned.plan.lines()) == 3


def test_nothing_to_fold(make, text, tmp_path):
    source = make()
    with pytest.raises(ConfigError, match=r"no gate normalization to fold[\s\S]*carries this model exactly"):
        run(request(source, tmp_path / "out", "skymoe", fold_gate_norm=True, text=str(text)))
    plain = random_directory(tmp_path / "plain", with_moe(SPEC, gate_norm=None))
    with pytest.raises(ConfigError, match=r"no gate normalization to fold[\s\S]*this model has none"):
        run(request(plain, tmp_path / "out", "mixtral", fold_gate_norm=True, text=str(text)))


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"too short", "too short"), (b"\xff\xfe" * 500, "not UTF-8"), (None, "cannot be read")],
)
def test_texts_that_are_of_no_use(content, told, make, text, tmp_path):
    text.write_bytes(content) if content is not None else text.unlink()
    with pytest.raises(ConfigError, match=told):
        run(request(make(), tmp_path / "out", "mixtral", fold_gate_norm=True, text=str(text)))
    assert not (tmp_path / "out").exists()


def test_only_the_beginning_of_a_long_text_is_read_also_through_a_character(make, text, tmp_path):
    text.write_text("ab" + "€" * 100_000, encoding="utf-8")  # byte 4096 is in the middle of a character
    options = {"fold_gate_norm": True, "text": str(text), "text_tokens": 64, "max_kl": 10.0, "sequence_length": 8}
    fold = run(request(make(), tmp_path / "out", "mixtral", **options)).fold
    assert (fold.fit_tokens, fold.held_out_tokens) == (48, 16)


def test_a_model_without_a_tokenizer(text, tmp_path):
    source = random_directory(tmp_path / "source", SPEC)
    with pytest.raises(FormatError, match="no tokenizer.json"):
        run(request(source, tmp_path / "out", "mixtral", fold_gate_norm=True, text=str(text)))
