"""The receipt: what is measured on which tokens, when it says exact, and what it says when it cannot."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from skymoe.convert.exactness import Exactness
from skymoe.convert.receipt import judge, measure
from skymoe.convert.running import RunningSoftmax
from skymoe.convert.streamed import NOT_SCORED, Comparison, streamed_losses
from skymoe.convert.text import TEXT, sample_tokens
from skymoe.data.tokenizer import train_tokenizer

PROMISE = Exactness(True, "the same tensors")


@pytest.fixture
def model(oracle, tmp_path):
    return oracle.make(tmp_path / "model", "mixtral", vocab_size=300)


def with_tokenizer(path):
    pytest.importorskip("tokenizers")
    train_tokenizer([TEXT], 290).save(path)
    return path


def damaged_copy(model, name, index, value):
    copy = model.parent / "damaged"
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name][index] += value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_copy_is_exact_on_the_fixed_text(model):
    with_tokenizer(model)
    receipt = measure(model, model, PROMISE, num_tokens=50, seed=1)
    assert (receipt.exact, receipt.reason) == (True, "the same tensors")
    assert (receipt.max_abs_dlogit, receipt.top1_agreement, receipt.num_tokens) == (0, 1, 200)
    assert receipt.tokens == "150 tokens of a fixed English text (scored), 50 random tokens"
    ids = torch.tensor(train_tokenizer([TEXT], 290).encode(TEXT))[:150].view(3, 50)
    expected = float(streamed_losses(model, ids).mean())
    assert receipt.reference_loss == receipt.loss == pytest.approx(expected, rel=1e-6)
    assert receipt.perplexity == pytest.approx(math.exp(expected))
    assert receipt.num_experts == 15
    assert 10 <= receipt.experts_reached <= 15
    assert {each.format for each in receipt.exports if each.exact} >= {"mixtral", "qwen2_moe", "skymoe", "gguf"}
    assert json.loads(json.dumps(receipt.as_json(), allow_nan=False))["exports"][0]["format"] == "mixtral"


def test_without_a_tokenizer_the_tokens_are_random_and_the_receipt_says_so(model, monkeypatch):
    receipt = measure(model, model, PROMISE, num_tokens=7, seed=3)
    assert (receipt.num_tokens, receipt.seed) == (14, 3)
    assert receipt.tokens == "14 random tokens (the model has no tokenizer.json)"
    assert receipt.loss is not None
    with_tokenizer(model)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "extra `text`" in measure(model, model, PROMISE, num_tokens=7, seed=3).tokens


CANNOT_SAY_IT = json.dumps({"version": "1.0", "added_tokens": [], "model": {
    "type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "?"}})  # fmt: skip


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '{"model": 3, "added_tokens": "x"}', CANNOT_SAY_IT])
def test_a_broken_tokenizer_is_not_fatal(content, model):
    (model / "tokenizer.json").write_text(content)
    assert measure(model, model, PROMISE, num_tokens=5, seed=0).tokens.startswith("10 random tokens (its tokenizer")


def test_a_tokenizer_of_a_larger_vocabulary_is_not_used(model):
    with_tokenizer(model)
    assert "another vocabulary" in sample_tokens(model, 100, num_tokens=9, seed=0).told


def test_sample_tokens(model):
    with_tokenizer(model)
    sample = sample_tokens(model, 300, num_tokens=11, seed=5)
    assert sample.tokens_BT.shape == sample.targets_BT.shape == (4, 11)
    assert torch.equal(sample.targets_BT[:3, :-1], sample.tokens_BT[:3, 1:])
    assert (sample.targets_BT[:, -1] == NOT_SCORED).all()
    assert (sample.targets_BT[3] == NOT_SCORED).all()
    assert torch.equal(sample.tokens_BT, sample_tokens(model, 300, num_tokens=11, seed=5).tokens_BT)
    assert not torch.equal(sample.tokens_BT[3], sample_tokens(model, 300, num_tokens=11, seed=6).tokens_BT[3])
    longer = sample_tokens(model, 300, num_tokens=100_000, seed=5)  # than the text
    assert longer.tokens_BT.shape == (2, len(train_tokenizer([TEXT], 290).encode(TEXT)))
    (model / "tokenizer.json").unlink()
    everything = sample_tokens(model, 7, num_tokens=4000, seed=0).tokens_BT
    assert everything.unique().tolist() == list(range(7))


def test_nothing_measured(model):
    receipt = measure(model, model, PROMISE, num_tokens=0, seed=0)
    assert (receipt.exact, receipt.max_abs_dlogit, receipt.loss, receipt.num_tokens) == (True, None, None, 0)
    assert (receipt.reason, receipt.computed) == ("the same tensors (not measured)", "not at all")
    assert receipt.exports


def test_a_damaged_copy_is_not_exact(model):
    damaged = damaged_copy(model, "model.layers.1.block_sparse_moe.experts.2.w1.weight", 0, 0.5)
    receipt = measure(model, damaged, PROMISE, num_tokens=64, seed=0)
    assert not receipt.exact
    assert "please report" in receipt.reason
    assert receipt.kl > 0
    assert receipt.loss != receipt.reference_loss


def test_not_a_number_is_told_and_fits_json(model):
    damaged = damaged_copy(model, "model.norm.weight", 3, float("nan"))
    receipt = measure(model, damaged, PROMISE, num_tokens=8, seed=0)
    assert (receipt.exact, receipt.max_abs_dlogit, receipt.loss, receipt.perplexity) == (False, None, None, None)
    assert receipt.reason == "a logit is infinite or not a number; it should be exact (the same tensors)"
    json.dumps(receipt.as_json(), allow_nan=False)


def test_the_verdict():
    def found(difference, scale=1.0):
        return Comparison(difference, scale, 0.0, 1.0, 1.0, 1.0, 8, 7, 0)

    assert judge(PROMISE, found(9e-5), narrowed=False) == (True, "the same tensors")
    assert judge(PROMISE, found(9e-4, 10.0), narrowed=False)[0]
    assert not judge(PROMISE, found(2e-4), narrowed=False)[0]
    assert judge(PROMISE, found(9e-5), narrowed=True)[0]
    assert judge(PROMISE, found(2e-2), narrowed=True) == (
        False, "the weights were rounded to a narrower format; before that, the same tensors",
    )  # fmt: skip
    assert judge(Exactness(False, "noise"), found(0.0), narrowed=False) == (False, "noise")
    for bad in (math.nan, math.inf):
        told = "a logit is infinite or not a number; "
        for narrowed in (False, True):
            expected = (False, f"{told}it should be exact (the same tensors)")
            assert judge(PROMISE, found(bad), narrowed=narrowed) == expected
        assert judge(Exactness(False, "noise"), found(bad), narrowed=False) == (False, f"{told}noise")
        assert judge(PROMISE, found(bad, bad), narrowed=False)[0] is False  # infinite in proportion is no agreement


def test_kl_by_hand():
    """KL((1/2, 1/2) || softmax(1, 0)), one block per token of the vocabulary; and 0 to itself."""
    targets_N = torch.tensor([0, NOT_SCORED])
    p_NV, q_NV = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    p, q = RunningSoftmax(targets_N), RunningSoftmax(targets_N)
    for token in range(2):
        part = range(token, token + 1)
        p.add(part, p_NV[:, token : token + 1], other_NC=q_NV[:, token : token + 1])
        q.add(part, q_NV[:, token : token + 1])
    weights = torch.softmax(torch.tensor([1.0, 0.0], dtype=torch.float64), -1)
    expected = float((0.5 * (0.5 / weights).log()).sum())
    assert p.kl(q).tolist() == pytest.approx([0, expected], abs=1e-15)
    assert p.losses()[0].item() == pytest.approx(math.log(2))
    assert q.top_N.tolist() == [0, 0]


def test_the_running_softmax_survives_large_logits():
    logits_NV = torch.tensor([[-3e4, 2e4, 1e4, 3e4, -1e4]])
    running = RunningSoftmax(torch.tensor([2]))
    for token in range(5):
        running.add(range(token, token + 1), logits_NV[:, token : token + 1])
    assert running.losses().item() == 2e4
    assert running.top_N.item() == 3
