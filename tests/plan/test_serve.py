"""`skymoe plan serve`: the divisions, the memory and the rates that it answers."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from skymoe.base.config import check_config
from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError, SkymoeError
from skymoe.cli.plan import app
from skymoe.plan.serve.config import PlanServeConfig
from skymoe.plan.serve.run import run
from skymoe.spec.flops import kv_bytes_per_token
from skymoe.spec.presets import PRESETS
from skymoe.spec.serving_plan import read_serving_plan

EVEN = (5, 5, 5, 5, 4, 4, 4, 4)


def plan(model="skywork-moe", gpus="8xrtx4090", weights="fp8", **options):
    return run(check_config(PlanServeConfig, {"model": model, "gpus": gpus, "weights": weights, **options}))


def by_batch(report):
    return {point.batch: point for point in report.sweep}


def test_skywork_moe_on_eight_4090s():
    report = plan(context=4096)
    assert report.splits["heads"] == report.splits["kv_groups"] == EVEN
    assert report.splits["ffn_blocks"] == (12,) * 8
    assert report.splits["experts"] == (16,) * 8
    assert sum(report.splits["vocabulary"]) == 65536
    assert report.ffn_block == 128
    assert all(needed <= 24.0 for needed in report.memory_gb)
    assert sum(gpu.weights for gpu in report.memory) == pytest.approx(146.36 + 0.60, rel=0.01)  # ends in bf16
    for batch in (96, 128):
        assert report.tokens_per_s[batch] == pytest.approx(2200, rel=0.15)
        assert by_batch(report)[batch].fits


def test_rotation_leaves_more_room_for_keys_and_values():
    report = plan()
    assert report.kv_tokens_rotated == report.kv_tokens
    gain = report.kv_tokens_rotated / report.kv_tokens_not_rotated
    assert 1.10 < gain < 1.14  # 5 / 4.5 of the keys and values, and the fifth head's weights
    assert plan(rotate=False).kv_tokens == report.kv_tokens_not_rotated


def test_keys_and_values_per_gpu_are_those_of_the_model():
    report = plan(context=4096)
    whole = kv_bytes_per_token(PRESETS["skywork-moe"], DType.BFLOAT16) * 4096 / 1e9
    assert sum(gpu.context for gpu in report.memory) == pytest.approx(whole)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_unequal_gpus_get_unequal_shares(objective):
    report = plan(gpus="4xa100-80g,4xrtx4090", objective=objective)
    for unit in ("heads", "kv_groups", "ffn_blocks", "vocabulary"):
        fast, slow = report.splits[unit][:4], report.splits[unit][4:]
        assert min(fast) > max(slow), unit
    assert sum(report.splits["heads"]) == 36
    assert sum(report.splits["ffn_blocks"]) == 96
    assert all(memory.needed <= memory.memory for memory in report.memory)


def test_a_small_gpu_gets_what_fits():
    report = plan(model="llama-3-8b", gpus="1xrtx4090,1xl40s,1xl4", weights="bf16", kv="bf16", context=8192)
    assert sum(report.splits["kv_groups"]) == 8
    assert sum(report.splits["heads"]) == 32
    assert [4 * groups for groups in report.splits["kv_groups"]] == list(report.splits["heads"])  # never cut
    assert all(memory.needed <= memory.memory for memory in report.memory)
    assert report.splits["ffn_blocks"][0] > report.splits["ffn_blocks"][2]


def test_heads_are_replicated_where_there_are_too_few():
    report = plan(model="qwen3-30b-a3b", gpus="8xrtx4090")
    assert report.replicas == 2
    assert report.splits["heads"] == (4,) * 8
    assert report.splits["kv_groups"] == (1,) * 8
    assert any("replicated" in note for note in report.notes)


def test_columns_are_all_kept_on_gpus_that_do_not_divide_them():
    report = plan(gpus="7xrtx4090")
    assert sum(report.splits["ffn_blocks"]) * report.ffn_block == 12288
    assert sorted(report.splits["heads"]) == [5, 5, 5, 5, 5, 5, 6]
    assert sum(report.splits["vocabulary"]) == 65536


def test_whole_experts():
    report = plan(gpus="6xa6000", experts="whole")
    assert sum(report.splits["experts"]) == 16
    assert report.splits["ffn_blocks"] == (96,) * 6
    cut = plan(gpus="6xa6000")
    assert by_batch(report)[8].step_s > by_batch(cut)[8].step_s  # the fullest GPU is waited for


def test_given_divisions():
    report = plan(model="llama-3-8b", gpus="2xrtx4090", split=("weights=3,1",))
    assert report.splits["kv_groups"] == (6, 2)
    assert report.splits["ffn_blocks"] == (84, 28)
    heads = plan(model="llama-3-8b", gpus="3xrtx4090", split=("heads=20,8,4",))
    assert heads.splits["heads"] == (20, 8, 4)
    assert sum(heads.splits["ffn_blocks"]) == 112


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"gpus": "6xrtx4090"}, "does not fit", "7xrtx4090"),
        ({"weights": "bf16"}, "does not fit", "--weights fp8"),
        ({"gpus": "7xrtx4090", "context": 8192, "reserve": 4.0}, "lacking", "--context"),
        ({"gpus": "8xrtx4091"}, "no GPU", "rtx4090"),
        ({"model": "skywork-mo"}, "no such model directory or preset", "skywork-moe"),
        ({"context": 9000}, "context of 9000", "8192"),
        ({"split": ("heads=5,5",)}, "needs 8 numbers", "--split heads=5,5,5,5,4,4,4,4"),
        ({"split": ("ffn=5,5",)}, "needs 8 numbers", "--split ffn=12,12,12,12,12,12,12,12"),
        ({"split": ("weights=3,1",)}, "needs 8 numbers", "--split weights=13,13,13,13,12,12,12,12"),
        ({"split": ("heads=6,6,6,6,6,6,6,6",)}, "sum to 48, not 36", "--split heads=5,5,5,5,4,4,4,4"),
        ({"split": ("heads=0,0,0,0,0,0,0,0",)}, "sum to 0, not 36", "--split heads=5,5,5,5,4,4,4,4"),
        ({"prompt": 9999, "output": 9999}, "longer than the context of 8192", "--prompt 4096 --output 4096"),
        ({"prompt": 3000, "output": 3000, "context": 4096}, "longer than", "--context 6000, or shorter: --prompt 2048"),
        ({"split": ("bread=1",)}, "cannot read", "heads=5,5,4"),
        ({"split": ("experts=2,2,2,2,2,2,2,2",)}, "whole experts", "--experts whole"),
        ({"engine": "vlm"}, "no engine", ""),
        ({"batch": (0,)}, "--batch", ""),
        ({"reserve": 9000.0}, "9000.00 GB of a GPU are reserved, and it has 25.", "--reserve 6."),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(options, said, hint):
    with pytest.raises(SkymoeError) as caught:
        plan(**options)
    assert said in caught.value.what + caught.value.why
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_refusal_says_how_much_is_lacking_on_each_gpu_and_its_hints_work():
    with pytest.raises(SkymoeError) as caught:
        plan(gpus="6xrtx4090")
    assert "GB are lacking in all" in caught.value.what
    assert "the fastest division lacks 1." in caught.value.why and "GB on each rtx4090" in caught.value.why
    assert plan(gpus="7xrtx4090").fits
    assert plan(gpus="6xrtx4090", weights="int4").fits


def test_rates_grow_with_the_batch_and_gaps_too():
    report = plan()
    for before, after in pairwise(report.sweep):
        assert after.tokens_per_s > before.tokens_per_s
        assert after.step_s > before.step_s
    for point in report.sweep:
        assert point.mixed_tokens_per_s <= point.tokens_per_s
        assert sum(point.parts.values()) == pytest.approx(1.0)
    fitting = [point.batch for point in report.sweep if point.fits]
    assert report.best_batch == max(fitting)
    assert max(fitting) * 256 <= report.kv_tokens < 192 * 256


def test_fp8_keys_and_values_double_the_room():
    assert plan(kv="fp8").kv_tokens == pytest.approx(2 * plan().kv_tokens, rel=0.01)


def test_dense_70b_beside():
    report = plan(compare="llama-3-70b", price=0.4)
    rival = report.rival
    assert rival is not None
    assert rival.fits
    assert rival.active_ratio == pytest.approx(70.5 / 22.4, rel=0.03)
    assert rival.times_cheaper > 1.5
    assert report.cost.money == pytest.approx(0.4 * report.cost.gpu_hours)
    too_large = plan(model="qwen3-30b-a3b", gpus="2xrtx4090", compare="skywork-moe").rival
    assert not too_large.fits
    assert "does not fit" in too_large.why


def test_layers_over_gpus():
    choice = plan().pipeline
    assert sum(choice.layers) == 52
    assert max(choice.layers) == 7
    assert choice.vllm == "VLLM_PP_LAYER_PARTITION=" + ",".join(map(str, choice.layers))
    dense = plan(model="llama-3-70b", gpus="8xl4").pipeline
    assert sum(dense.layers) == 80
    assert dense.layers[0] < 10 or dense.layers[-1] < 10  # embedding and head count


def test_the_plan_file(tmp_path):
    path = tmp_path / "serving.json"
    report = plan(gpus="3xa100-80g", save=path)
    read = read_serving_plan(path)
    assert read == report.plan
    assert read.split.heads == report.splits["heads"] == (12, 12, 12)
    eight = plan()
    totals = [sum(eight.plan.heads(layer).sizes[rank] for layer in range(52)) for rank in range(8)]
    assert max(totals) - min(totals) <= 1
    assert sum(totals) == 36 * 52
    assert eight.plan.heads(0).sizes == EVEN


def test_the_command(tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["serve", "--model", "skywork-moe", "--gpus", "8xrtx4090", "--weights", "fp8", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["splits"]["heads"] == list(EVEN)
    assert answer["best_batch"] in (96, 128)
    assert answer["tokens_per_s"]["128"] == next(p for p in answer["sweep"] if p["batch"] == 128)["tokens_per_s"]
    table = runner.invoke(app, ["serve", "--model", "skywork-moe", "--gpus", "8xrtx4090", "--weights", "fp8"])
    assert "0-3 rtx4090" in table.stdout
    assert "predicted" in table.stdout


def test_a_request_longer_than_the_context_is_refused_before_its_chunks_are_counted():
    with pytest.raises(ConfigError, match="longer than the context of 4096"):
        plan(context=4096, prompt=4000, output=200)
    with pytest.raises(ConfigError, match="longer than the context of 8192"):
        plan(prompt=1 << 27)
    assert plan(prompt=5000, output=100, batch=(1,)).context == 5100


def test_a_refusal_tells_kinds_of_gpu_apart():
    with pytest.raises(SkymoeError) as caught:
        plan(gpus="4xrtx4090,2xrtx3090")
    assert "GB on each rtx4090, none on rtx3090 (" in caught.value.why


def test_the_largest_reserve_is_the_largest_that_fits():
    with pytest.raises(ConfigError) as caught:
        plan(reserve=100.0)
    largest = float(caught.value.hint.split("--reserve ")[1].split(";")[0])
    assert plan(reserve=largest, batch=(1,)).fits
    with pytest.raises(ConfigError):
        plan(reserve=largest + 0.1)


def test_a_slower_step_with_more_room_is_explained():
    chosen, fastest = (plan(gpus="4xrtx4090,3xrtx3090", objective=name) for name in ("throughput", "latency"))
    assert chosen.splits["heads"][-1] > chosen.splits["heads"][0]
    assert chosen.kv_tokens > fastest.kv_tokens
    told = [note for note in chosen.notes if "not the fastest step" in note]
    assert len(told) == 1 and f"heads {','.join(map(str, fastest.splits['heads']))} " in told[0]
    assert not any("not the fastest step" in note for note in fastest.notes)
    own, other = (max(p.mixed_tokens_per_s for p in report.sweep if p.fits) for report in (chosen, fastest))
    assert own >= other


def test_gpus_without_heads_are_named():
    assert any("without heads" in note and note.endswith(": 1, 3, 5, 7") for note in plan(gpus="40xrtx4090").notes)
    assert not any("without heads" in note for note in plan().notes)
