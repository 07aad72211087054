"""What other programs are told: their own grammars read it back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError
from skymoe.plan.emit.emit import emit
from skymoe.plan.emit.megatron import layout_string, recompute_flags
from skymoe.plan.emit.others import module_names
from skymoe.plan.emit.whole import is_whole, whole_layers
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Recompute
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.plan_file import read_plan
from skymoe.spec.presets import preset
from skymoe.spec.split import Split

SKYWORK = shape_of(preset("skywork-moe"))


def read_megatron(string: str) -> list[str]:
    """Letters per stage, by the rules of Megatron's documentation: commas mean nothing, groups repeat, then letters."""
    plain = string.replace(",", "")
    while group := re.search(r"\(([^()]*)\)\*(\d+)", plain):
        plain = plain[: group.start()] + group[1] * int(group[2]) + plain[group.end() :]
    while letter := re.search(r"([EtmL])\*(\d+)", plain):
        plain = plain[: letter.start()] + letter[1] * int(letter[2]) + plain[letter.end() :]
    assert re.fullmatch(r"[EtmL|]*", plain)
    return plain.split("|")


def test_the_reader_reads_megatrons_own_example() -> None:
    assert read_megatron("Et*3|(tt|)*29,m|L") == ["Ettt", *["tt"] * 29, "m", "L"]


@given(st.integers(0, 9), st.lists(st.integers(1, 7), max_size=40), st.integers(0, 9))
@settings(deadline=None)
def test_round_trip(first: int, inner: list[int], last: int) -> None:
    stages = read_megatron(layout_string([first, *inner, last]))
    assert stages == ["E" + "t" * first, *("t" * count for count in inner), "t" * last + "L"]


def test_repeats_are_short() -> None:
    assert layout_string([3, *[2] * 29, 1]) == "Et*3|(tt|)*29t,L"
    assert layout_string([5, 4, 4, 4, 5, 0]) == "Et*5|(t*4|)*3t*5|L"
    assert layout_string([7]) == "Et*7,L"


def skywork_layout(**more: Any) -> Layout:
    fields: dict[str, Any] = {"pp": 12, "dp": 32, "tp": 4, "dispatch": DispatchMode.ALL_TO_ALL, **more}
    return Layout(**{"stages": Split((10,) * 4 + (8,) * 8), **fields})


def test_skywork() -> None:
    found = emit(skywork_layout(), SKYWORK, micro_batch=1, num_micro=24, expected={"step_s": 9.5})
    megatron = found["megatron"]
    assert [stage.count("t") for stage in read_megatron(megatron["layout"])] == [5] * 4 + [4] * 8
    assert f'--pipeline-model-parallel-layout "{megatron["layout"]}"' in megatron["flags"]
    wanted = ("tensor-model-parallel-size 4", "pipeline-model-parallel-size 12", "expert-model-parallel-size 4")
    assert all(f"--{flag}" in megatron["flags"] for flag in (*wanted, "expert-tensor-parallel-size 1"))
    assert "--global-batch-size 768" in megatron["flags"] and "--sequence-parallel" in megatron["flags"]
    assert not any("recompute" in flag for flag in megatron["flags"])
    assert found["vllm"]["environment"] == {"VLLM_PP_LAYER_PARTITION": "5,5,5,5,4,4,4,4,4,4,4,4"}
    assert found["deepspeed"]["parts"] == [0, 6, 11, 16, 21, 25, 29, 33, 37, 41, 45, 49, 54]
    titan = found["torchtitan"]["parallelism.module_fqns_per_model_part"]
    assert titan[0] == ["tok_embeddings", *(f"layers.{layer}" for layer in range(5))]
    assert titan[-1] == [*(f"layers.{layer}" for layer in range(48, 52)), "norm", "output"]
    assert found["torchtitan"]["parallelism.expert_parallel_degree"] == 4
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("axis", "ep", "etp"), [(ExpertAxis.EDP, 4, 1), (ExpertAxis.EP, 16, 1), (ExpertAxis.ETP, 4, 4)]
)
def test_expert_axes(axis: ExpertAxis, ep: int, etp: int) -> None:
    layout = Layout(pp=1, dp=4, tp=4, expert=axis, stages=Split((104,)))
    flags = emit(layout, SKYWORK)["megatron"]["flags"]
    assert f"--expert-model-parallel-size {ep}" in flags and f"--expert-tensor-parallel-size {etp}" in flags
    assert "--moe-token-dispatcher-type allgather" in flags
    assert not any("layout" in flag for flag in flags)


def test_the_plan_file_is_what_training_reads(tmp_path: Path) -> None:
    layout = skywork_layout(stages=Split((9,) * 8 + (8,) * 4), recompute=(1,) * 6 + (0,) * 6)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(emit(layout, SKYWORK, expected={"step_s": 2.0})["plan_file"]))
    plan = read_plan(path)
    assert plan.layout == layout and plan.num_layers == 52 and plan.expected == {"step_s": 2.0}


def test_cuts_within_layers_are_rounded_and_said() -> None:
    found = emit(skywork_layout(stages=Split((9,) * 8 + (8,) * 4)), SKYWORK)
    assert found["megatron"]["layers_per_stage"] == [4, 5] * 4 + [4] * 4
    assert sum("rounded" in note for note in found["notes"]) == 2
    assert found["plan_file"]["layout"]["split"] == [4.5] * 8 + [4] * 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(deadline=None)
def test_rounding(halves: list[int]) -> None:
    if sum(halves) % 2:
        halves[0] += 1
    stages = Split(tuple(halves))
    layers = whole_layers(stages)
    if layers is None:
        assert stages.num_units // 2 < stages.num_ranks - 2
        return
    assert sum(layers) * 2 == stages.num_units and min(layers) >= 0 and min(layers[1:-1], default=1) > 0
    if is_whole(stages):
        assert [2 * size for size in layers] == halves
    if min(halves) > 2:
        assert all(abs(2 * size - half) <= 1 for size, half in zip(layers, halves, strict=True))


def test_more_stages_than_layers_is_said() -> None:
    shape = replace(SKYWORK, layers=SKYWORK.layers[:2])
    found = emit(Layout(pp=6, stages=Split((0, 1, 1, 1, 1, 0))), shape)
    assert found["megatron"] is None and found["vllm"] is None and found["plan_file"]["layout"]["pp"] == 6
    assert sum("layers" in note for note in found["notes"]) == 2


@pytest.mark.parametrize(
    ("counts", "base", "flags", "said"),
    [
        ((0, 0), Recompute.NONE, "", 0),
        ((0, 0), Recompute.SELECTIVE, "--recompute-granularity selective --recompute-modules core_attn", 0),
        ((5, 4), Recompute.NONE, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 0),
        ((2, 2), Recompute.NONE, "--recompute-granularity full --recompute-method block --recompute-num-layers 2", 0),
        ((3, 1), Recompute.NONE, "--recompute-granularity full --recompute-method block --recompute-num-layers 3", 1),
        (
            (1, 1),
            Recompute.MOE_ACT,
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            1,
        ),
    ],
)
def test_recompute(counts: tuple[int, int], base: Recompute, flags: str, said: int) -> None:
    found, notes = recompute_flags(counts, (5, 4), base)
    assert " ".join(found) == flags and len(notes) == said


def test_several_stages_per_rank() -> None:
    stages = Split((14, 13, 13, 13, 13, 13, 13, 12))
    found = emit(Layout(pp=4, stages=stages, schedule=ScheduleKind.INTERLEAVED), SKYWORK)
    assert len(read_megatron(found["megatron"]["layout"])) == 8
    assert found["vllm"] is None
    vee = emit(Layout(pp=4, stages=stages, schedule=ScheduleKind.ZERO_BUBBLE), SKYWORK)
    assert any("zero-bubble" in note for note in vee["notes"])
    assert vee["torchtitan"]["parallelism.pipeline_parallel_schedule"] == "ZBVZeroBubble"


def test_what_does_not_divide_is_said() -> None:
    notes = emit(Layout(tp=5, dp=1, stages=Split((104,))), SKYWORK)["notes"]
    assert any("36 over 5" in note for note in notes) and any("16 over 5" in note for note in notes)


def test_another_model() -> None:
    with pytest.raises(ConfigError, match="52"):
        emit(Layout(stages=Split((10,))), SKYWORK)


def test_modules_once_each() -> None:
    names = [name for stage in module_names([2, 3, 0]) for name in stage]
    assert names == ["tok_embeddings", *(f"layers.{layer}" for layer in range(5)), "norm", "output"]


@pytest.mark.parametrize(
    "precision, flags", [("fp32", set()), ("bf16", {"--bf16"}), ("fp8", {"--bf16", "--fp8-format hybrid"})]
)
def test_megatron_is_told_the_precision(precision, flags):
    found = emit(Layout(stages=Split((104,))), SKYWORK, precision=Precision(precision))["megatron"]["flags"]
    assert {flag for flag in found if "bf16" in flag or "fp8" in flag} == flags
