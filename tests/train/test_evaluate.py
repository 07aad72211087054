from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train.tiny import MOE, VOCAB, write_tokens

from skymoe.data.evaluation import EvaluationWindows
from skymoe.data.indexed import IndexedDataset
from skymoe.model.init import initialize
from skymoe.model.transformer import Transformer
from skymoe.train.evaluate import Held, evaluate, layer_similarities
from skymoe.train.model_config import SpecConfig

CPU = torch.device("cpu")
LENGTHS_V = (np.arange(VOCAB) % 5).astype(np.uint16)  # token 0 is special: no bytes


@pytest.fixture
def model() -> Transformer:
    return initialize(Transformer(SpecConfig.model_validate(MOE, strict=False).to_spec()), seed=2)


@pytest.fixture
def prefixes(tmp_path):
    return {name: write_tokens(tmp_path / name, seed=seed, documents=4) for seed, name in enumerate(("prose", "code"))}


def held(prefixes, *, batch: int, lengths=LENGTHS_V) -> Held:
    return Held({name: EvaluationWindows(prefix, 17) for name, prefix in prefixes.items()}, lengths, batch, False)


def test_bits_per_byte_is_the_definition_on_the_raw_tokens(model, prefixes):
    figures = evaluate(model, held(prefixes, batch=3), compute=None, device=CPU)
    tokens = torch.from_numpy(IndexedDataset(prefixes["code"]).tokens.astype(np.int64))
    nats, count, num_bytes = 0.0, 0, 0
    for start in range(0, len(tokens) - 1, 17):
        inputs, targets = tokens[start : start + 17][: len(tokens) - 1 - start], tokens[start + 1 : start + 18]
        with torch.no_grad():
            nats += float(F.cross_entropy(model(inputs[None])[0], targets, reduction="sum"))
        count += len(targets)
        num_bytes += int(LENGTHS_V[targets.numpy()].sum())
    assert count == len(tokens) - 1
    assert figures["loss"]["code"] == pytest.approx(nats / count, rel=1e-5)
    assert figures["bits_per_byte"]["code"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_all_is_the_sum_over_domains_and_batching_changes_nothing(model, prefixes):
    small, large = (evaluate(model, held(prefixes, batch=n), compute=None, device=CPU) for n in (1, 50))
    for domain in ("prose", "code", "all"):
        assert small["bits_per_byte"][domain] == pytest.approx(large["bits_per_byte"][domain], rel=1e-6)
    low, high = sorted(small["bits_per_byte"][name] for name in ("prose", "code"))
    assert low <= small["bits_per_byte"]["all"] <= high


def test_the_load_of_every_layer_sums_to_one_per_domain(model, prefixes):
    figures = evaluate(model, held(prefixes, batch=3), compute=None, device=CPU)
    assert figures["expert_load"].keys() == prefixes.keys()
    for layers in figures["expert_load"].values():
        assert [len(layer) for layer in layers] == [5, 5]
        assert [sum(layer) for layer in layers] == pytest.approx([1.0, 1.0])


def test_identical_experts_have_similarity_one(model):
    with torch.no_grad():
        for weight in (model.layers[1].moe.experts.gate_up, model.layers[1].moe.experts.down):
            weight.copy_(weight[:1].expand_as(weight))
    random, identical = layer_similarities(model)
    assert identical == pytest.approx(1.0, abs=1e-6)
    assert abs(random) < 0.2


def test_without_a_tokenizer_there_are_no_bytes(model, prefixes):
    figures = evaluate(model, held(prefixes, batch=3, lengths=None), compute=None, device=CPU)
    assert figures["bits_per_byte"] == {} and set(figures["loss"]) == {"prose", "code", "all"}


def test_evaluating_draws_no_random_numbers(model, prefixes):
    before = torch.get_rng_state()
    evaluate(model, held(prefixes, batch=3), compute=torch.bfloat16, device=CPU)
    assert torch.equal(before, torch.get_rng_state())
