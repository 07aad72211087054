from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.base.errors import SkymoeError
from skymoe.model.batch import BatchInfo, KVCache
from skymoe.model.transformer import Transformer
from skymoe.ops.attention import attention_mask, reference_attention
from skymoe.ops.experts import ExpertsBackend
from skymoe.ops.loss import linear_cross_entropy, reference_cross_entropy
from skymoe.ops.rotary import inverse_frequencies
from skymoe.spec.model import MoESpec, QkNorm, RopeScaling, RopeSpec


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- the whole model, spelled out with the parameter names of the contract -----------------------------------------


def plain_forward(model: Transformer, tokens_T: Tensor) -> Tensor:
    """One sequence, one token at a time where it can be: (T,) -> (T, V). Independent of the modules."""
    spec, w = model.spec, {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x / ((x * x).mean(-1, keepdim=True) + spec.norm_eps).sqrt()

    def project(x: Tensor, name: str) -> Tensor:
        bias = w.get(f"{name}.bias")
        return x @ w[f"{name}.weight"].t() + (0 if bias is None else bias)

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    def rotate(x_THC: Tensor) -> Tensor:
        frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim, spec.max_position)
        out = torch.empty_like(x_THC)
        for t in range(x_THC.shape[0]):
            for c in range(spec.head_dim // 2):
                angle = t * frequencies[c]
                a, b = x_THC[t, :, c], x_THC[t, :, c + spec.head_dim // 2]
                out[t, :, c] = (a * angle.cos() - b * angle.sin()) * factor
                out[t, :, c + spec.head_dim // 2] = (b * angle.cos() + a * angle.sin()) * factor
        return out

    def mixture(x_TD: Tensor, name: str) -> Tensor:
        moe, out = spec.moe, []
        assert moe is not None
        for x in x_TD:
            z = w[f"{name}.router.weight"] @ x
            if moe.gate_norm:
                z = moe.gate_norm.scale * (z - z.mean()) / (z.std(correction=moe.gate_norm.ddof) + moe.gate_norm.eps)
            g = z.softmax(-1)
            score = (z if moe.gate_norm else g) + w.get(f"{name}.router.expert_bias", torch.zeros(()))
            chosen = score.argsort(descending=True)[: moe.top_k]
            total = g[chosen].sum() if moe.norm_topk else 1.0
            y = torch.zeros_like(x)
            for e in chosen:
                gate, up = w[f"{name}.experts.gate_up"][e].chunk(2)
                y = y + g[e] / total * swiglu(x, gate, up, w[f"{name}.experts.down"][e])
            if moe.shared_ffn_size:
                weights = [w[f"{name}.shared.{part}.weight"] for part in ("gate", "up", "down")]
                y = y + torch.sigmoid(w[f"{name}.shared_gate.weight"] @ x) * swiglu(x, *weights)
            out.append(y)
        return torch.stack(out)

    x = w["embed.weight"][tokens_T]
    for layer in range(spec.num_layers):
        name = f"layers.{layer}"
        h = norm(x, f"{name}.attention_norm.weight")
        heads = [project(h, f"{name}.attention.{p}") for p in "qkv"]
        if spec.qk_norm is QkNorm.FULL:
            heads[:2] = [norm(y, f"{name}.attention.{p}_norm.weight") for y, p in zip(heads, "qk", strict=False)]
        heads = [y.unflatten(-1, (-1, spec.head_dim)) for y in heads]
        if spec.qk_norm is QkNorm.HEAD:
            heads[:2] = [norm(y, f"{name}.attention.{p}_norm.weight") for y, p in zip(heads, "qk", strict=False)]
        q, k, v = (y.transpose(0, 1)[None] for y in (rotate(heads[0]), rotate(heads[1]), heads[2]))
        y = reference_attention(q, k, v, attention_mask(len(x), len(x), window=spec.window(layer)))
        x = x + project(y[0].transpose(0, 1).flatten(1), f"{name}.attention.o")
        h = norm(x, f"{name}.ffn_norm.weight")
        if spec.is_moe_layer(layer):
            x = x + mixture(h, f"{name}.moe")
        else:
            gate, up = (project(h, f"{name}.mlp.{p}") for p in ("gate", "up"))
            x = x + project(F.silu(gate) * up, f"{name}.mlp.down")
    return norm(x, "norm.weight") @ w["embed.weight" if spec.tie_embeddings else "head.weight"].t()


@pytest.mark.parametrize("backend", list(ExpertsBackend))
def test_the_model_is_the_plain_one(make, variant, backend: ExpertsBackend) -> None:
    model = make(
        **variant, experts=backend, rope=RopeSpec(scaling=RopeScaling.YARN, factor=4.0, original_max_position=8)
    )
    for layer in model.layers:
        if layer.moe is not None and layer.moe.router.expert_bias is not None:
            layer.moe.router.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.0]))
    tokens = random_tokens(2, 9)
    expected = torch.stack([plain_forward(model, row) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-3, atol=1e-4)


def test_fp64_runs_through_and_agrees_with_the_plain_model(make, variant) -> None:
    model = make(**variant, dtype=torch.float64)
    tokens = random_tokens(2, 7)
    logits = model(tokens)
    assert logits.dtype is torch.float64
    expected = torch.stack([plain_forward(model, row) for row in tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-7)  # rotary tables are fp32


def test_gradients_agree_with_the_plain_model(make, variant) -> None:
    model = make(**variant, dtype=torch.float64)
    tokens, targets = random_tokens(1, 6), random_tokens(1, 6, seed=1)
    loss, _ = linear_cross_entropy(model.hidden(tokens).hidden_BTD, model.head_weight, targets)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(plain_forward(model, tokens[0]), targets[0], reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_training_and_evaluation_mode_agree(make, variant) -> None:
    """Attention takes another road with gradients than without."""
    model, tokens = make(**variant), random_tokens(2, 9)
    with torch.no_grad():
        without = model(tokens)
    torch.testing.assert_close(model(tokens), without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [(1,) * 9, (4, 1, 1, 3), (9,), (8, 1)])
def test_a_cache_gives_the_full_forward(make, variant, steps: tuple[int, ...]) -> None:
    model, tokens = make(**variant), random_tokens(2, 9)
    with torch.no_grad():
        expected = model(tokens)
        cache = KVCache(model.spec, 2, 12)
        parts = [model.logits(model.hidden(part, cache=cache).hidden_BTD) for part in tokens.split(steps, dim=1)]
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_a_full_cache_says_so_and_changes_nothing(make) -> None:
    model, cache = make(), KVCache(make().spec, 1, 4)
    with torch.no_grad():
        model.hidden(random_tokens(1, 3), cache=cache)
        with pytest.raises(SkymoeError, match="5 tokens do not fit a cache of 4"):
            model.hidden(random_tokens(1, 2), cache=cache)
    assert cache.length == 3


def test_a_narrow_cache_is_close(make, variant) -> None:
    model, tokens = make(**variant), random_tokens(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(model.spec, 2, 6, dtype=torch.bfloat16)
        first = model.logits(model.hidden(tokens[:, :5], cache=cache).hidden_BTD)
        last = model.logits(model.hidden(tokens[:, 5:], cache=cache).hidden_BTD)
    assert first.isfinite().all() and last.isfinite().all()


def test_a_document_is_as_if_alone(make, variant) -> None:
    """Packed documents with restarted positions equal separate sequences."""
    model, first, second = make(**variant), random_tokens(1, 4), random_tokens(1, 5, seed=1)
    packed = torch.cat((first, second), 1)
    info = BatchInfo(
        positions_BT=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), document_ids_BT=torch.tensor([[7] * 4 + [3] * 5])
    )
    together = model.logits(model.hidden(packed, info).hidden_BTD)
    alone = torch.cat((model(first), model(second)), 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    without = model.logits(model.hidden(packed).hidden_BTD)
    assert not torch.allclose(without[:, 4:], alone[:, 4:], rtol=1e-2), "isolation made no difference"


def test_rows_of_a_batch_do_not_meet(make, variant) -> None:
    model, tokens = make(**variant), random_tokens(3, 6)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=1e-4, atol=1e-5)


def test_positions_default_to_counting_from_zero(make) -> None:
    model, tokens = make(), random_tokens(2, 5)
    explicit = BatchInfo(positions_BT=torch.arange(5).expand(2, 5))
    assert model.hidden(tokens, explicit).hidden_BTD.equal(model.hidden(tokens).hidden_BTD)


def test_what_pads_contain_changes_no_bit_elsewhere(make, variant) -> None:
    model, tokens = make(**variant), random_tokens(2, 8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 5:] = valid[1, 7:] = False
    other = torch.where(valid, tokens, random_tokens(2, 8, seed=5))
    assert not other.equal(tokens)
    capacities = (None, 4) if model.spec.moe else (None,)
    for capacity in capacities:
        info = BatchInfo(valid_BT=valid, capacity=capacity)
        a, b = model.hidden(tokens, info), model.hidden(other, info)
        assert a.hidden_BTD[valid].equal(b.hidden_BTD[valid])
        for x, y in zip(a.routings, b.routings, strict=True):
            assert x.counts_E.equal(y.counts_E) and int(x.counts_E.sum()) == 12 * model.spec.moe.top_k
            assert x.expert_ids_TK.equal(y.expert_ids_TK)
            assert (x.expert_ids_TK[~valid.flatten()] == model.spec.moe.num_experts).all()


def test_a_batch_of_pads_only_is_harmless(make, variant) -> None:
    model, tokens = make(**variant), random_tokens(1, 4)
    out = model.hidden(tokens, BatchInfo(valid_BT=torch.zeros(1, 4, dtype=torch.bool)))
    loss, count = linear_cross_entropy(out.hidden_BTD, model.head_weight, torch.full_like(tokens, -100))
    loss.backward()
    assert int(count) == 0 and all(int(r.counts_E.sum()) == 0 for r in out.routings)
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_gradients_with_pads_are_those_without_them(make, variant) -> None:
    model, tokens, targets = make(**variant, dtype=torch.float64), random_tokens(1, 5), random_tokens(1, 5, seed=1)
    loss, _ = linear_cross_entropy(model.hidden(tokens).hidden_BTD, model.head_weight, targets)
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    padded, padded_targets = F.pad(tokens, (0, 3), value=1), F.pad(targets, (0, 3), value=-100)
    info = BatchInfo(valid_BT=torch.arange(8)[None] < 5)
    loss, count = linear_cross_entropy(model.hidden(padded, info).hidden_BTD, model.head_weight, padded_targets)
    loss.backward()
    assert int(count) == 5
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-6, atol=1e-8)


def test_one_routing_per_moe_layer(make) -> None:
    moe = MoESpec(num_experts=4, top_k=3, ffn_size=8)
    model = make(moe=moe, moe_layers=(1, 2))
    assert [layer.moe is not None for layer in model.layers] == [False, True, True]
    out = model.hidden(random_tokens(2, 5))
    assert len(out.routings) == 2
    assert all(r.weights_TK.shape == (10, 3) and r.logits_TE.dtype is torch.float32 for r in out.routings)
    assert make().hidden(random_tokens(1, 3)).routings == ()


def test_names_and_shapes_are_the_contract(make) -> None:
    moe = MoESpec(num_experts=4, top_k=2, ffn_size=8, expert_bias=True, shared_ffn_size=6)
    model = make(moe=moe, moe_layers=(1,), num_layers=2, qkv_bias=True, qk_norm=QkNorm.HEAD)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    attention = {
        "attention.q.weight": (24, 20),
        "attention.q.bias": (24,),
        "attention.k.weight": (8, 20),
        "attention.k.bias": (8,),
        "attention.v.weight": (8, 20),
        "attention.v.bias": (8,),
        "attention.o.weight": (20, 24),
        "attention.q_norm.weight": (4,),
        "attention.k_norm.weight": (4,),
        "attention_norm.weight": (20,),
        "ffn_norm.weight": (20,),
    }
    dense = {"mlp.gate.weight": (28, 20), "mlp.up.weight": (28, 20), "mlp.down.weight": (20, 28)}
    experts = {
        "moe.router.weight": (4, 20),
        "moe.router.expert_bias": (4,),
        "moe.experts.gate_up": (4, 16, 20),
        "moe.experts.down": (4, 20, 8),
        "moe.shared.gate.weight": (6, 20),
        "moe.shared.up.weight": (6, 20),
        "moe.shared.down.weight": (20, 6),
        "moe.shared_gate.weight": (1, 20),
    }
    assert shapes == {
        "embed.weight": (37, 20),
        "norm.weight": (20,),
        "head.weight": (37, 20),
        **{f"layers.0.{name}": shape for name, shape in {**attention, **dense}.items()},
        **{f"layers.1.{name}": shape for name, shape in {**attention, **experts}.items()},
    }
    assert "head.weight" not in make(tie_embeddings=True).state_dict()


def test_a_tied_head_is_the_embedding(make) -> None:
    model, tokens = make(tie_embeddings=True), random_tokens(1, 4)
    assert model.head_weight is model.embed.weight
    loss, _ = linear_cross_entropy(model.hidden(tokens).hidden_BTD, model.head_weight, tokens)
    loss.backward()
    found = model.embed.weight.grad
    model.zero_grad()
    reference_cross_entropy(model.hidden(tokens).hidden_BTD, model.head_weight, tokens).backward()
    torch.testing.assert_close(found, model.embed.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [(), (0, 1, 2)])
def test_bf16_autocast_works_for_every_kind_of_layer(make, variant, recompute: tuple[int, ...]) -> None:
    model, tokens, targets = make(**variant), random_tokens(2, 9), random_tokens(2, 9, seed=1)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model.hidden(tokens, recompute=recompute)
            loss, _ = linear_cross_entropy(out.hidden_BTD, model.head_weight, targets)
        loss.backward()
        assert loss.dtype is torch.float32
        assert all(r.logits_TE.dtype is r.weights_TK.dtype is torch.float32 for r in out.routings)
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(*grads, dim=0) > 0.9


def test_bf16_weights_work_too(make, variant) -> None:
    model, tokens = make(**variant, dtype=torch.bfloat16), random_tokens(2, 5)
    loss, _ = linear_cross_entropy(model.hidden(tokens).hidden_BTD, model.head_weight, tokens)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_backends_agree_in_fp32(make, moe) -> None:
    tokens = random_tokens(2, 9)
    a, b = (make(moe=moe, experts=backend)(tokens) for backend in ExpertsBackend)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_frequencies_survive_inference_mode(make) -> None:
    """The first call of a process may be one in inference mode; training afterwards uses the same cached table."""
    rope = RopeSpec(theta=12345.0)
    model, tokens = make(rope=rope), random_tokens(1, 4)
    with torch.inference_mode():
        first = model(tokens)
    loss = model(tokens).square().sum()
    loss.backward()
    torch.testing.assert_close(model(tokens).detach(), first.clone(), rtol=1e-4, atol=1e-5)


def test_the_model_can_be_copied(make, moe) -> None:
    model, tokens = make(moe=moe), random_tokens(1, 4)
    assert copy.deepcopy(model)(tokens).equal(model(tokens))


def test_dynamic_rope_looks_at_the_longest_position(make) -> None:
    model = make(rope=RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2.0), max_position=4)
    plain = make(max_position=4)
    short, long = random_tokens(1, 4), random_tokens(1, 9)
    torch.testing.assert_close(model(short), plain(short))
    assert not torch.allclose(model(long), plain(long), rtol=1e-2)
