"""A small random model with a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

from skymoe.data.tokenizer import train_tokenizer
from skymoe.model.init import initialize
from skymoe.model.save import save_pretrained
from skymoe.model.transformer import Transformer
from skymoe.spec.model import Architecture, ModelSpec, MoESpec

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPEC = ModelSpec(
    architecture=Architecture.MIXTRAL, vocab_size=320, hidden_size=24, num_layers=2, ffn_size=30, num_heads=6,
    num_kv_heads=3, head_dim=8, max_position=200, init_std=0.2, moe=MoESpec(num_experts=4, top_k=2, ffn_size=20),
)  # fmt: skip


def write(folder: Path, *, template: bool = True) -> Path:
    """The directory."""
    train_tokenizer(["the quick brown fox, der schnelle Fuchs: 狐 🦊 [user] [assistant]"] * 3, 320).save(folder / "t")
    save_pretrained(initialize(Transformer(SPEC), seed=3), folder / "model", tokenizer_from=folder / "t")
    if template:
        (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "model"
