"""Whatever the division, the logits are those of the one-device model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.models import MODELS, write_fp8, write_model
from engine.ranks import ThreadedRanks, difference, random_prompts, serve
from safetensors.torch import load_file, save_file
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError, FormatError, SkymoeError
from skymoe.engine.config import EngineConfig
from skymoe.engine.division import divide
from skymoe.engine.load import load_share
from skymoe.engine.step import Chunk, StepPlan
from skymoe.engine.weights import Fp8, SideBySide
from skymoe.model.load import load
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import RopeScaling, RopeSpec
from skymoe.weights.names import Layout, tensor_table

PROMPTS = random_prompts(97, (23, 1, 17))
SLOW = pytest.mark.slow


class Made:
    """Models of this file and what the one-device model says, each made once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._directories: dict[str, Path] = {}
        self._logits: dict[Path, list[Tensor]] = {}

    def __call__(self, name: str, scheme: str = "") -> Path:
        key = f"{name} {scheme}".strip()
        if key not in self._directories:
            out = self._factory.mktemp("made") / "m"
            self._directories[key] = write_fp8(self(name), out, scheme) if scheme else write_model(out, name)
        return self._directories[key]

    def expected(self, path: Path) -> list[Tensor]:
        """fp32 logits of PROMPTS."""
        if path not in self._logits:
            model = load(path, torch.float32)
            with torch.no_grad():
                self._logits[path] = [model(torch.tensor([prompt]))[0] for prompt in PROMPTS]
        return self._logits[path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory)


def config(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(model=path, **{"page_size": 4, "max_batch": 2, "dtype": DType.FLOAT32, **changes})


def served(path: Path, **changes: Any) -> list[Tensor]:
    with ThreadedRanks(config(path, **changes)) as ranks:
        return serve(ranks.run, PROMPTS, page_size=4, num_pages=ranks.runners[0].num_pages)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(difference(*pair) for pair in zip(found, expected, strict=True))


def check(made: Made, path: Path, **changes: Any) -> None:
    assert worst(served(path, **changes), made.expected(path)) < 1e-5


# ---- every kind of model, every number of ranks


def cases() -> list[Any]:
    shown = {"llama", "skymoe", "qwen3_moe", "olmoe"}
    return [
        pytest.param(name, tp, marks=() if tp == 3 or name in shown else SLOW)
        for name in MODELS for tp in (1, 2, 3, 4) if tp <= MODELS[name].num_heads
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "tp"), cases())
def test_logits_are_those_of_the_one_device_model(made: Made, name: str, tp: int) -> None:
    """9 heads on 3 groups, 10 on 5, FFN 200, 6 experts: on 4 ranks a group of 3 heads is shared by two of them."""
    check(made, made(name), tp=tp)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("mixtral", ("experts=2,2,1,1",)),
        ("skywork_moe", ("experts=6,5,5", "heads=3,2,1")),
        ("skymoe", ("experts=4,0,2",)),
        ("qwen2_moe", ("experts=5,1",)),
        ("qwen3_moe", ("weights=3,1",)),
        ("llama", ("weights=5,2,1",)),
        ("llama", ("heads=6,3,0", "ffn=0,7,193", "vocabulary=0,97,0")),
        ("olmoe", ("heads=1,2,3,3,0", "ffn=0,0,20,0,0")),
        ("mistral_window", ("heads=3,1,4",)),
    ],
)
def test_any_split(made: Made, name: str, split: tuple[str, ...]) -> None:
    """Whole experts, unequal shares, ranks without heads, columns or rows: they still take part."""
    check(made, made(name), split=split)


def test_without_rotation(made: Made) -> None:
    check(made, made("skymoe"), tp=4, rotate=False)


# ---- FP8


FP8 = [
    pytest.param(name, tp, scheme, marks=() if scheme == "block" or (name, tp) == ("mixtral_wide", 3) else SLOW)
    for name, tp in (("mixtral_wide", 1), ("mixtral_wide", 3), ("llama_wide", 4))
    for scheme in ("block", "channel", "tensor")
]


@pytest.mark.parametrize(("name", "tp", "scheme"), FP8)
def test_fp8_is_its_dequantized_reference(made: Made, name: str, tp: int, scheme: str) -> None:
    """On 3 ranks there are 2 blocks of columns for 3; heads of 64 channels make a rank begin within a block."""
    check(made, made(name, scheme), tp=tp)


@pytest.mark.parametrize("scheme", ["block", pytest.param("channel", marks=SLOW)])
def test_f1_gate_normalization_is_applied_with_fp8_too(made: Made, scheme: str) -> None:
    """The fork's FP8 path had lost the config, and with it the normalization: the same model without it differs."""
    path = made("skywork_wide", scheme)
    found = served(path, tp=2)
    assert worst(found, made.expected(path)) < 1e-5
    spec = spec_from_directory(path)
    assert spec.moe is not None and spec.moe.gate_norm is not None
    model = load(path, torch.float32)
    for layer in model.layers:
        layer.moe.router.moe = replace(spec.moe, gate_norm=None)
    with torch.no_grad():
        without = [model(torch.tensor([prompt]))[0] for prompt in PROMPTS]
    assert worst(found, without) > 1e-2


def test_f2_the_deviation_is_that_of_the_config(made: Made) -> None:
    """n - 1 in the released code: n would be another model, by 3 % of lambda for 16 experts, more for 6."""
    path = made("skywork_wide", "channel")
    model = load(path, torch.float32)
    moe = model.spec.moe
    assert moe is not None and moe.gate_norm is not None and moe.gate_norm.ddof == 1
    for layer in model.layers:
        layer.moe.router.moe = replace(moe, gate_norm=replace(moe.gate_norm, ddof=0))
    with torch.no_grad():
        other = [model(torch.tensor([prompt]))[0] for prompt in PROMPTS]
    found = served(path)
    assert worst(found, made.expected(path)) < 1e-5 < 1e-3 < worst(found, other)


def test_f3_no_column_is_lost(made: Made) -> None:
    """FFN 200 on 7 ranks; the fork gave each 28 and dropped 4."""
    check(made, made("llama"), tp=7)


def test_f6_scales_of_w1_and_w3_are_kept_apart(made: Made, tmp_path: Path) -> None:
    """One number per matrix, and another for w3 than for w1; the fork had one slot for both."""
    source = made("mixtral_wide", "tensor")
    path = _changed(source, tmp_path / "m", lambda name: 3.0 if ".w3.weight_scale" in name else 1.0)
    assert worst(made.expected(path), made.expected(source)) > 1e-2
    for changes in ({"tp": 1}, {"tp": 2}, {"split": ("experts=4,2",)}):
        check(made, path, **changes)


def _changed(source: Path, out: Path, factor: Any) -> Path:
    """A copy whose tensors are multiplied by `factor(name)`."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {n: t if factor(n) == 1.0 else t * factor(n) for n, t in load_file(file).items()}
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def test_fp8_stays_fp8_and_each_rank_has_its_part(made: Made) -> None:
    path = made("mixtral_wide", "block")
    spec = spec_from_directory(path)
    plan = divide(spec, config(path, tp=3), fp8_block=128)
    shares = [load_share(path, spec, plan, rank) for rank in range(3)]
    held = [0, 0, 0]
    for rank, share in enumerate(shares):
        for layer in share.layers:
            assert layer.attention is not None and layer.moe is not None
            experts = [matrix for expert in layer.moe.experts for matrix in (expert.gate_up, expert.down)]
            for matrix in (layer.attention.qkv, layer.attention.o, *experts):
                parts = matrix.parts if isinstance(matrix, SideBySide) else (matrix,)
                assert all(isinstance(part, Fp8) and part.codes_OI.dtype == torch.float8_e4m3fn for part in parts)
                held[rank] += sum(part.codes_OI.nbytes for part in parts if isinstance(part, Fp8))
    assert spec.moe is not None
    of_layer = 2 * 128 * (768 + 256) + 6 * 3 * 128 * 256
    assert sum(held) == 3 * of_layer
    assert max(held) - min(held) <= 6 * 3 * 128 * 128, "rotation gives each of 3 ranks 2 blocks in all but one layer"


# ---- number formats, batches, files


def test_bf16_and_fp8_caches_are_near(made: Made) -> None:
    """Dense: in a mixture of random weights a rounding sends tokens to other experts."""
    path = made("qwen2")
    assert worst(served(path, tp=2, dtype=DType.BFLOAT16), made.expected(path)) < 0.05
    assert worst(served(path, tp=3, kv_dtype="fp8"), made.expected(path)) < 0.2
    with pytest.raises(ConfigError, match="float16"):
        served(path, dtype=DType.FLOAT16)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize(("name", "tp"), [("skymoe", 1), ("skymoe", 3), ("olmoe", 4)])
def test_a_row_does_not_depend_on_the_batch(made: Made, name: str, tp: int, dtype: DType) -> None:
    """The same bits alone, and among others; in a decoding step, and in a chunk of a prompt."""
    with ThreadedRanks(config(made(name), tp=tp, dtype=dtype)) as ranks:
        a, b, c = random_prompts(97, (9, 13, 6), seed=5)
        prompt = Chunk(tuple(a), 0, (0, 1, 2), 9)
        alone = ranks.run(StepPlan((prompt,)))
        others = (Chunk(tuple(b), 0, (3, 4, 5, 6), 1), Chunk(tuple(c), 0, (7, 8), 6))
        among = ranks.run(StepPlan((others[0], prompt, others[1])))
        assert torch.equal(among[1:10], alone)
        step = Chunk((5,), 9, (0, 1, 2), 1)
        alone = ranks.run(StepPlan((step,)))
        among = ranks.run(StepPlan((Chunk((1, 2), 13, (3, 4, 5, 6), 0), step, Chunk((3,), 6, (7, 8), 1))))
        assert torch.equal(among[:1], alone)


def test_tokens_per_expert_are_counted_once(made: Made) -> None:
    with ThreadedRanks(config(made("qwen3_moe"), tp=3)) as ranks:
        ranks.run(StepPlan((Chunk(tuple(range(11)), 0, (0, 1, 2), 0),)))
        counts = ranks.runners[0].expert_tokens()
        assert [len(row) for row in counts] == [6, 6] and [sum(row) for row in counts] == [22, 22]
        assert all(runner.expert_tokens() == counts for runner in ranks.runners)


def test_experts_in_one_tensor_are_read(made: Made, tmp_path: Path) -> None:
    """As transformers holds them in memory, and some converters write them."""
    source, out = made("mixtral"), tmp_path / "m"
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    spec = spec_from_directory(source)
    fused = {name: torch.empty(place.shape) for name, place in tensor_table(spec, Layout.FUSED).items()}
    by_parameter = {place.parameter: name for name, place in tensor_table(spec, Layout.FUSED).items()}
    for name, place in tensor_table(spec).items():
        fused[by_parameter[place.parameter]][place.index] = tensors[name]
    save_file(fused, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    check(made, out, tp=3)


def _broken(source: Path, out: Path, what: str) -> Path:
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(768)
    elif what == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif what == "nan":
        tensors[name].view(torch.uint8)[5, 200] = 0x7F
    elif what == "scale":
        tensors[name + "_scale_inv"][0, 0] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("what", ["missing", "extra", "shape", "nan", "scale"])
def test_broken_files_are_refused(made: Made, what: str, tmp_path: Path) -> None:
    path = _broken(made("mixtral_wide", "block"), tmp_path / "m", what)
    spec = spec_from_directory(path)
    plan = divide(spec, config(path, tp=2), fp8_block=128)
    with pytest.raises(FormatError, match=r"experts\.3\.w2|q_proj\.bias"):
        load_share(path, spec, plan, 1)
    if what == "nan":
        load_share(path, spec, plan, 0)  # column 200 is not its own, and it has not read it


def test_room_for_keys_and_values(made: Made) -> None:
    path = made("llama")
    token = 3 * 2 * 3 * 6 * 4  # layers, k and v, heads, channels, bytes
    with ThreadedRanks(config(path, kv_memory_gb=40 * token / 1e9)) as ranks:
        assert ranks.runners[0].num_pages == 10 and ranks.runners[0].max_model_len == 40
    with ThreadedRanks(config(path, tp=3, kv_memory_gb=40 * token / 3 / 1e9)) as ranks:
        assert ranks.runners[0].num_pages == 10
    for memory, length, told in (
        (40 * token / 1e9, 41, "max_model_len=40"),
        (1e-9, None, "no memory"),
        (1e6, None, "free"),
    ):
        with pytest.raises(SkymoeError, match=told):
            ThreadedRanks(config(path, kv_memory_gb=memory, max_model_len=length))


def test_dynamic_ntk_is_served_within_its_original_context(tmp_path: Path, made: Made) -> None:
    path = write_model(tmp_path / "m", "llama", rope=RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2.0), max_position=32)
    assert json.loads((path / "config.json").read_text())["rope_scaling"]["rope_type"] == "dynamic"
    with ThreadedRanks(config(path, tp=2)) as ranks:
        assert ranks.runners[0].max_model_len == 32
    check(made, path, tp=2)
    with pytest.raises(ConfigError, match="32"):
        divide(spec_from_directory(path), config(path, max_model_len=33))
