"""The code of docs/router_kit.md runs, and does what the page says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "router_kit.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's code leaves behind."""
    pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    script = tmp_path_factory.mktemp("docs") / "router_kit.py"
    # Between the two: double precision and a large alpha, so that the second's gradient can be compared closely.
    between = 'model.set_experts_implementation("eager")\nmodel.double()\nalpha.restore({"alpha_L": [3.0, 5.0]})\n'
    script.write_text("\n".join([blocks[0], between, blocks[1]]), encoding="utf-8")
    return runpy.run_path(str(script))


def test_it_learns_and_alpha_follows_the_drop_rate(example: dict[str, Any]) -> None:
    assert example["losses"][-1] < 0.8 * example["losses"][0]
    assert all(0 < a < 0.01 for a in example["alphas"][-1]), "hardly anything is over capacity: alpha falls"
    assert example["alphas"][-1] != example["alphas"][-2]


def test_the_block_routes_by_the_normalized_gate(example: dict[str, Any]) -> None:
    """Every token's experts and weights, spelled out."""
    block = example["model"].model.layers[0].mlp
    x_TD = torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        found = block(x_TD[None])[0]
        z_TE = x_TD @ block.gate.weight.t()
        g_TE = ((z_TE - z_TE.mean(-1, keepdim=True)) / z_TE.std(-1, keepdim=True)).softmax(-1)
        for x_D, g_E, y_D in zip(x_TD, g_TE, found, strict=True):
            chosen = g_E.topk(2).indices
            expected = torch.zeros(32, dtype=torch.float64)
            for e in chosen:
                gate, up = (block.experts.gate_up_proj[e] @ x_D).chunk(2)
                weight = g_E[e] / g_E[chosen].sum()
                expected += weight * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
            torch.testing.assert_close(y_D, expected, rtol=1e-3, atol=1e-8)


def test_micro_batches_have_the_gradient_of_the_whole(example: dict[str, Any]) -> None:
    model, tokens, ops = example["model"], example["tokens"], example
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    out, routings = ops["routings_of"](tokens)
    balance = sum(
        a * ops["aux_loss"](ops["AuxLoss"].SKYWORK, r) for a, r in zip(ops["alpha"].alpha_L, routings, strict=True)
    )
    (out.loss + balance).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            accumulated[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
