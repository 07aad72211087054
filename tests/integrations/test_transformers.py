"""A `skymoe` export in transformers: with its own code, with the installed package's, and saved again from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export.models import NORMED, TOKENS, random_directory, request, with_moe
from safetensors.torch import load_file, save_file

from skymoe.export.run import run
from skymoe.model.load import load

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
ASK = """
import sys
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
source, tokens, out, *options = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    source, output_loading_info=True, attn_implementation="eager", **dict.fromkeys(options, True)
)
problems = {kind: keys for kind, keys in info.items() if keys}
assert not problems, problems
save_file({"logits": model.eval()(load_file(tokens)["tokens"]).logits.detach()}, out)
"""


def ask(code: str, *arguments: object, cwd: Path, **env: str) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "hf_modules"), **env}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_without_trust_after_import_skymoe_and_with_trust_where_it_is_not_installed(oracle, tmp_path):
    spec = with_moe(NORMED, shared_ffn_size=8, expert_bias=True)
    out = tmp_path / "out"
    assert run(request(random_directory(tmp_path / "source", spec), out, "skymoe")).exact
    with torch.no_grad():
        ours = load(out)(TOKENS)
    tokens, answer, again = tmp_path / "tokens", tmp_path / "answer", tmp_path / "again"
    save_file({"tokens": TOKENS}, tokens)

    local = (
        "import skymoe\n"
        + ASK
        + f"""
assert type(model).__module__ == "skymoe.hf_model.modeling_skymoe"
model.save_pretrained({str(again)!r})
"""
    )
    ask(local, out, tokens, answer, cwd=tmp_path, PYTHONPATH=str(ROOT))
    torch.testing.assert_close(load_file(answer)["logits"], ours, rtol=0, atol=1e-4)

    # What transformers saved there has its code with it, as our own export has.
    answer.unlink()
    remote = ASK + 'assert "skymoe" not in sys.modules\n'
    ask(remote, again, tokens, answer, "trust_remote_code", cwd=tmp_path)
    torch.testing.assert_close(load_file(answer)["logits"], ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(load(again)(TOKENS), ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(oracle.logits(out, TOKENS, trust_remote_code=True), ours, rtol=0, atol=1e-4)
