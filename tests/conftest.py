"""What all tests share.

Every test runs alone: one thread, no network beyond this machine, nothing from the caller's environment. The fixture
`oracle` makes tiny random checkpoints with transformers, the oracle of our formats.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is first imported; tiny matrices are slower on two threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("SKYMOE__")]:
    del os.environ[_name]


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A test that talks to another machine fails: skymoe never phones home."""
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: object) -> None:
        is_local = self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1"))
        assert is_local, f"a test tried to reach {address}"
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", only_here)
        yield


TINY: dict[str, dict[str, Any]] = {
    # odd on purpose: 3 heads, FFN 200, a vocabulary that is no multiple of anything
    "llama": dict(hidden_size=48, intermediate_size=200, num_attention_heads=3, num_key_value_heads=3, vocab_size=97),
    "mistral": dict(hidden_size=48, intermediate_size=120, num_attention_heads=6, num_key_value_heads=2, vocab_size=101,
                    sliding_window=None),
    "qwen2": dict(hidden_size=60, intermediate_size=88, num_attention_heads=6, num_key_value_heads=2, vocab_size=89),
    "qwen3": dict(hidden_size=40, intermediate_size=72, num_attention_heads=3, num_key_value_heads=1, head_dim=18,
                  vocab_size=83),
    "mixtral": dict(hidden_size=48, intermediate_size=56, num_attention_heads=6, num_key_value_heads=2, vocab_size=97,
                    num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": dict(hidden_size=48, intermediate_size=72, moe_intermediate_size=40, num_attention_heads=3,
                      num_key_value_heads=3, vocab_size=97, shared_expert_intermediate_size=24, num_experts=6,
                      num_experts_per_tok=3, norm_topk_prob=False),
    "qwen3_moe": dict(hidden_size=48, intermediate_size=72, moe_intermediate_size=40, num_attention_heads=6,
                      head_dim=10, num_key_value_heads=2, vocab_size=97, num_experts=5, num_experts_per_tok=2,
                      norm_topk_prob=True),
    "olmoe": dict(hidden_size=48, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2, vocab_size=97,
                  num_experts=7, num_experts_per_tok=3, pad_token_id=None, eos_token_id=1),
}  # fmt: skip


class HfOracle:
    """Makes checkpoints with transformers and asks transformers for logits."""

    def make(self, path: Path, model_type: str, **changes: Any) -> Path:
        """A random tiny model of `model_type` saved at `path`; biases and norms are random too."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        dtype = changes.pop("dtype", torch.float32)
        options = dict(num_hidden_layers=3, max_position_embeddings=64, initializer_range=0.1) | TINY[model_type]
        config = AutoConfig.for_model(model_type, **(options | changes))
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "gate.weight" in name:  # biases, norms; routers that clearly choose
                    parameter.copy_(torch.randn_like(parameter) * 0.5 + ("norm" in name))
        model.to(dtype).save_pretrained(path)
        return path

    def logits(self, path: Path, tokens_BT: Any, **options: Any) -> Any:
        """fp32 logits (B, T, V) by transformers of the model at `path`; no key may be missing or unexpected."""
        import torch
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager", **options
        )
        problems = {kind: keys for kind, keys in info.items() if keys and kind != "error_msgs"}
        assert not problems, problems
        with torch.no_grad():
            return model.eval()(tokens_BT).logits


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> HfOracle:
    # read when transformers is imported: where it keeps the Python files of models, and that it stays off the network
    os.environ.setdefault("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf_modules")))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    return HfOracle()
