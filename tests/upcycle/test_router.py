"""New routers: normal, uniform, from hidden states; and the gradient that they get."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.tokenizer import train_tokenizer
from skymoe.model.load import load
from skymoe.ops.reproducible import normal
from skymoe.upcycle.centroids import spherical_k_means
from skymoe.upcycle.run import dry_run, run
from tests.upcycle.conftest import TOKENS, config_of, edit_config

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
TEXT = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42; def f(x): return x\n" * 30


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_random_routers_have_the_deviation_asked_for(kind, parents, tmp_path):
    run(config_of(parents("llama"), tmp_path / "moe", experts=64, router_init=kind, router_std=0.05, receipt_tokens=0))
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    routers = torch.cat([tensors[ROUTER.format(layer)] for layer in range(3)])
    assert routers.std() == pytest.approx(0.05, rel=0.03)
    assert routers.mean() == pytest.approx(0, abs=0.002)
    assert (routers.abs().max() <= 0.05 * 3**0.5) == (kind == "uniform")
    assert not torch.equal(tensors[ROUTER.format(0)], tensors[ROUTER.format(1)])


# ---- the gradient at step 0


@pytest.mark.parametrize("options", [{"experts": 4}, {"experts": 5, "top_k": 3, "gate_norm": True}])
def test_the_router_gets_no_gradient_at_step_0_and_some_after_a_step(options, parents, tmp_path):
    run(config_of(parents("llama"), tmp_path / "moe", receipt_tokens=0, router_std=0.5, **options))
    model = load(tmp_path / "moe", dtype="float64")
    routers = [block.moe.router.weight for block in model.layers]

    def backward() -> float:
        logits = model(TOKENS[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        return max(router.grad.abs().max().item() for router in routers)

    assert backward() < 1e-14
    experts = [block.moe.experts.gate_up for block in model.layers]
    assert min(weight.grad.abs().max().item() for weight in experts) > 1e-4
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    assert backward() > 1e-6


def test_top_1_with_renormalization_never_trains_its_router(parents, tmp_path):
    report = run(config_of(parents("llama"), tmp_path / "moe", experts=4, top_k=1, receipt_tokens=0))
    assert "no gradient" in report.remarks[0]


# ---- centroids


@pytest.fixture(scope="module")
def parent_with_tokenizer(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("centroids")
    oracle.make(path, "llama", vocab_size=300)
    train_tokenizer([TEXT], 300).save(path)
    (path / "text.txt").write_text(TEXT)
    return path


def centroid_options(parent, **options):
    return {"router_init": "centroids", "centroid_text": str(parent / "text.txt"), "receipt_tokens": 24, **options}


def test_centroids_tell_tokens_apart_from_the_start(parent_with_tokenizer, tmp_path):
    parent = parent_with_tokenizer
    report = run(config_of(parent, tmp_path / "moe", experts=4, **centroid_options(parent)))
    assert report.exact
    model = load(tmp_path / "moe")
    for block in model.layers:
        length = block.moe.router.weight.norm(dim=-1)
        torch.testing.assert_close(length, torch.full((4,), 0.02 * 48**0.5))
    ids = torch.tensor([train_tokenizer([TEXT], 300).encode(TEXT)[:64]])
    with torch.no_grad():
        routings = model.hidden(ids).routings
    assert all((routing.counts_E > 0).all() for routing in routings)
    again = run(config_of(parent, tmp_path / "again", experts=4, **centroid_options(parent)))
    assert again.exact
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = json.loads((tmp_path / "moe" / "skymoe.json").read_text())["options"]
    assert (told["router_init"], len(told["centroid_tokens_sha256"])) == ("centroids", 64)
    assert "text.txt" not in json.dumps(told)


def test_a_virtual_group_shares_a_centroid(parent_with_tokenizer, tmp_path):
    parent = parent_with_tokenizer
    options = centroid_options(parent, method="virtual_group", granularity=4, expansion=3, layers=[1])
    assert run(config_of(parent, tmp_path / "moe", **options)).exact
    router = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert len(router.unique(dim=0)) == 3
    assert all(torch.equal(router[4 * e], router[4 * e + 3]) for e in range(3))


def test_what_centroids_need(parent_with_tokenizer, parents, tmp_path):
    parent = parent_with_tokenizer
    with pytest.raises(ConfigError, match="belong together"):
        config_of(parent, tmp_path / "moe", router_init="centroids")
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        run(config_of(parents("llama"), tmp_path / "moe", **centroid_options(parent)))
    with pytest.raises(ConfigError, match="cannot be read"):
        run(config_of(parent, tmp_path / "moe", **centroid_options(parent, centroid_text="/no/such.txt")))
    (tmp_path / "short.txt").write_text("a fox")
    with pytest.raises(ConfigError, match="tokens cannot be put into 4096 clusters"):
        run(config_of(parent, tmp_path / "moe", **centroid_options(parent, experts=4096)))
    with pytest.raises(ConfigError, match="the text has"):
        run(config_of(parent, tmp_path / "moe", **centroid_options(parent, centroid_text=str(tmp_path / "short.txt"))))
    planned = dry_run(config_of(parent, tmp_path / "moe", experts=4, **centroid_options(parent)))
    assert "centroids of 4 clusters" in "\n".join(planned.plan.lines())
    assert not (tmp_path / "moe").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(parent_with_tokenizer, oracle, tmp_path):
    import shutil

    small = oracle.make(tmp_path / "small", "llama", vocab_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parent_with_tokenizer / name, small / name)
    edit_config(small)
    with pytest.raises(FormatError, match="the model has 64"):
        run(config_of(small, tmp_path / "moe", **centroid_options(parent_with_tokenizer)))


def test_k_means_finds_clusters_that_are_there():
    middles_CD = F.normalize(normal((5, 16), 1.0, "middles"), dim=-1)
    x_TD = middles_CD.repeat(40, 1) * 3 + normal((200, 16), 0.1, "spread")
    found_CD = spherical_k_means(x_TD, 5, "key")
    cosine = found_CD @ middles_CD.T
    assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    assert cosine.max(1).values.min() > 0.99
    torch.testing.assert_close(found_CD.norm(dim=-1), torch.ones(5))
    assert torch.equal(found_CD, spherical_k_means(x_TD, 5, "key"))


def test_k_means_of_too_few_different_points_leaves_no_cluster_empty():
    x_TD = torch.eye(3).repeat(4, 1)
    found_CD = spherical_k_means(x_TD, 5, "key")
    assert torch.isfinite(found_CD).all()
    torch.testing.assert_close(found_CD.norm(dim=-1), torch.ones(5))
