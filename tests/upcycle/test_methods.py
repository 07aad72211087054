"""What each method writes, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from skymoe.spec.hf import spec_from_directory
from skymoe.upcycle.run import run
from tests.upcycle.conftest import config_of

MLP, MOE = "model.layers.1.mlp", "model.layers.1.block_sparse_moe"
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


@pytest.fixture
def convert(parents, tmp_path):
    """Options -> (tensors of the parent, tensors of the output); names of Llama and Mixtral."""
    count = iter(range(100))

    def call(source="llama", **options):
        out = tmp_path / f"out{next(count)}"
        paths = source if isinstance(source, list) else parents(source)
        run(config_of(paths, out, receipt_tokens=0, **options))
        first = paths[0] if isinstance(paths, list) else paths
        return load_file(first / "model.safetensors"), load_file(out / "model.safetensors")

    return call


def expert(tensors, number, matrix):
    return tensors[f"{MOE}.experts.{number}.{NAMES[matrix]}.weight"]


def dense(tensors, matrix):
    return tensors[f"{MLP}.{matrix}_proj.weight"]


def changed_neurons(before, after, matrix):
    return (before != after).any(0 if matrix == "down" else 1).nonzero()[:, 0].tolist()


def test_drop_draws_half_of_the_neurons_like_what_they_replace(convert):
    before, after = convert(method="drop", experts=4)
    sets = []
    for number in range(4):
        changed = [changed_neurons(dense(before, m), expert(after, number, m), m) for m in NAMES]
        assert changed[0] == changed[1] == changed[2]
        assert len(changed[0]) == 100  # of 200
        sets.append(tuple(changed[0]))
        for matrix in NAMES:
            axis = 1 if matrix == "down" else 0
            index = torch.tensor(changed[0])
            old, new = (x.index_select(axis, index) for x in (dense(before, matrix), expert(after, number, matrix)))
            assert new.std() == pytest.approx(old.std().item(), rel=0.05)
            assert new.mean() == pytest.approx(old.mean().item(), abs=3 * old.std().item() / old.numel() ** 0.5)
    assert len(set(sets)) == 4
    first, second = expert(after, 0, "gate"), expert(after, 1, "gate")
    assert not torch.equal(first[list(sets[0])], second[list(sets[1])])


def test_drop_follows_the_mean_of_the_dropped_slice(parents, oracle, tmp_path):
    path = oracle.make(tmp_path / "shifted", "llama")
    tensors = load_file(path / "model.safetensors")
    tensors[f"{MLP}.up_proj.weight"] += 3.0
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    run(config_of(path, tmp_path / "moe", method="drop", ratio=1.0, experts=2, receipt_tokens=0))
    new = expert(load_file(tmp_path / "moe" / "model.safetensors"), 1, "up")
    assert new.mean() == pytest.approx(3.0, abs=0.01)
    assert new.std() == pytest.approx(0.1, rel=0.05)


def test_drop_per_matrix_leaves_few_neurons_whole(convert):
    before, after = convert(method="drop", experts=2, drop_indices="per_matrix")
    changed = [set(changed_neurons(dense(before, m), expert(after, 0, m), m)) for m in NAMES]
    assert [len(neurons) for neurons in changed] == [100, 100, 100]
    whole = 200 - len(set.union(*changed))
    assert 10 < whole < 40  # one eighth is 25


def test_seeds_decide_and_repeat(convert):
    _, first = convert(method="drop", experts=2, seed=1)
    _, again = convert(method="drop", experts=2, seed=1)
    _, other = convert(method="drop", experts=2, seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(expert(first, 0, "up"), expert(other, 0, "up"))
    _, more = convert(method="drop", experts=5, seed=1)
    assert torch.equal(expert(first, 1, "down"), expert(more, 1, "down"))  # of no other expert, of no other count


def test_noise_has_the_size_that_was_asked_for(convert):
    before, after = convert(method="noise", experts=3, noise_share=0.25, noise_std=0.5)
    for matrix in NAMES:
        old, new = dense(before, matrix), expert(after, 2, matrix)
        neurons = torch.tensor(changed_neurons(old, new, matrix))
        assert len(neurons) == 50
        difference = (new - old).index_select(1 if matrix == "down" else 0, neurons)
        assert difference.std() == pytest.approx(0.5 * old.std().item(), rel=0.05)


def test_virtual_groups_lie_in_the_order_of_megatron(convert):
    before, after = convert(method="virtual_group", granularity=4, expansion=3)
    for e in range(3):
        for g in range(4):
            part = slice(50 * g, 50 * (g + 1))
            assert torch.equal(expert(after, 4 * e + g, "gate"), dense(before, "gate")[part])
            assert torch.equal(expert(after, 4 * e + g, "up"), dense(before, "up")[part])
            assert torch.equal(expert(after, 4 * e + g, "down"), 4 * dense(before, "down")[:, part])
    router = after[f"{MOE}.gate.weight"]
    assert router.shape[0] == 12
    assert all(torch.equal(router[4 * e], router[4 * e + g]) for e in range(3) for g in range(4))
    assert not torch.equal(router[0], router[4])


@pytest.mark.parametrize(("norm_topk", "factor"), [(True, 4.0), (False, 3 * 16 / 6)])
def test_he2024_scales_all_three_matrices(norm_topk, factor, convert):
    options = {"granularity": 4, "expansion": 3, "top_k": 6, "norm_topk": norm_topk, "weight_scale": "he2024"}
    before, after = convert(method="virtual_group", **options)
    after = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in after.items()}
    names = NAMES if norm_topk else {m: f"{m}_proj" for m in NAMES}  # Qwen2-MoE carries what is not renormalized
    for matrix, name in names.items():
        part = dense(before, matrix).chunk(4, 1 if matrix == "down" else 0)[1]
        torch.testing.assert_close(after[f"{MLP}.experts.5.{name}.weight"], factor ** (1 / 3) * part)


def test_a_shared_expert_has_the_first_shards(convert):
    options = {"granularity": 5, "expansion": 2, "shared": "split", "shared_shards": 2}
    before, after = convert(method="virtual_group", **options)
    assert torch.equal(after[f"{MLP}.shared_expert.gate_proj.weight"], dense(before, "gate")[:80])
    assert torch.equal(after[f"{MLP}.shared_expert.down_proj.weight"], 2 * dense(before, "down")[:, :80])
    assert not after[f"{MLP}.shared_expert_gate.weight"].any()
    assert torch.equal(after[f"{MLP}.experts.4.up_proj.weight"], dense(before, "up")[120:160])  # e = 1, g = 1
    assert torch.equal(after[f"{MLP}.experts.4.down_proj.weight"], 3 * dense(before, "down")[:, 120:160])


def test_zero_routed_keeps_the_experts_but_for_their_output(convert):
    before, after = convert(shared="zero_routed", experts=3)
    for number in range(3):
        assert torch.equal(after[f"{MLP}.experts.{number}.gate_proj.weight"], dense(before, "gate"))
        assert not after[f"{MLP}.experts.{number}.down_proj.weight"].any()
    assert torch.equal(after[f"{MLP}.shared_expert.down_proj.weight"], 2 * dense(before, "down"))


def test_specialists_and_the_average(oracle, parents, tmp_path, convert):
    other = oracle.make(tmp_path / "other", "llama", initializer_range=0.2)
    theirs = load_file(other / "model.safetensors")
    before, after = convert([parents("llama"), other], method="specialists", assign=[1, 0, 1, 1])
    for number, source in enumerate((theirs, before, theirs, theirs)):
        assert all(torch.equal(expert(after, number, m), dense(source, m)) for m in NAMES)
    rest = [name for name in before if ".mlp." not in name]
    assert all(torch.equal(after[name], before[name]) for name in rest)
    _, mean = convert([parents("llama"), other], method="specialists", experts=4, rest="average", layers=[1])
    for name in rest:
        torch.testing.assert_close(mean[name], (before[name] + theirs[name]) / 2)
    torch.testing.assert_close(
        mean["model.layers.0.mlp.up_proj.weight"],
        (before["model.layers.0.mlp.up_proj.weight"] + theirs["model.layers.0.mlp.up_proj.weight"]) / 2,
    )
    assert torch.equal(mean[f"{MLP}.experts.3.up_proj.weight"], dense(theirs, "up"))  # round and round


@pytest.mark.parametrize("order", ["random", "contiguous"])
def test_a_partition_uses_every_neuron_once(order, convert):
    before, after = convert(method="partition", experts=8, partition_order=order)
    gate = torch.cat([expert(after, i, "gate") for i in range(8)])
    up = torch.cat([expert(after, i, "up") for i in range(8)])
    down = torch.cat([expert(after, i, "down") for i in range(8)], 1) / 8
    where = (dense(before, "gate")[None] == gate[:, None]).all(-1).int().argmax(1)
    assert torch.equal(where.sort().values, torch.arange(200))
    assert torch.equal(where, torch.arange(200)) == (order == "contiguous")
    assert torch.equal(up, dense(before, "up")[where])
    assert torch.equal(down, dense(before, "down")[:, where])


def test_the_scale_of_a_partition(convert):
    for options, scale in (({"norm_topk": False, "top_k": 4}, 16), ({"output_scale": 3.0}, 3), ({}, 8)):
        before, after = convert(method="partition", experts=8, partition_order="contiguous", **options)
        found = next(
            t
            for name, t in after.items()
            if name.endswith(("1.experts.0.w2.weight", "moe.experts.0.w2.weight"))
            or name == "model.layers.0.mlp.experts.0.down_proj.weight"
        )
        torch.testing.assert_close(found, scale * before["model.layers.0.mlp.down_proj.weight"][:, :25])


def test_clones_come_round(convert):
    before, after = convert("mixtral", method="duplicate", experts=8)  # of 5
    for number in range(8):
        assert all(torch.equal(expert(after, number, m), expert(before, number % 5, m)) for m in NAMES)
    old, new = before[f"{MOE}.gate.weight"], after[f"{MOE}.gate.weight"]
    assert torch.equal(new[:5], old)
    difference = new[5:] - old[:3]
    assert 0.005 < difference.std() / old.std() < 0.015
    _, exact = convert("mixtral", method="duplicate")
    assert torch.equal(exact[f"{MOE}.gate.weight"], torch.cat([old, old]))


def test_the_normalization_of_a_cloned_gate(parents, tmp_path):
    for factor in (2, 3):
        run(
            config_of(
                parents("skymoe"), tmp_path / str(factor), method="duplicate", experts=6 * factor, receipt_tokens=0
            )
        )
        norm = spec_from_directory(tmp_path / str(factor)).moe.gate_norm
        wanted = (factor * 5 / (6 * factor - 1)) ** 0.5
        assert (norm.scale, norm.eps) == pytest.approx((1.7 * wanted, 1e-2 * wanted))
    bias = load_file(tmp_path / "2" / "model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias[:6], bias[6:])
    assert bias.max() == pytest.approx(0.2)  # added to normalized logits, which did not change
    run(config_of(parents("skymoe_biased"), tmp_path / "b", method="duplicate", experts=15, receipt_tokens=0))
    bias = load_file(tmp_path / "b" / "model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.max() == pytest.approx(0.2 / 3)
