"""Which rank has what: nothing lost, nothing twice, and the remainder going round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.models import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError, FormatError
from skymoe.engine.config import EngineConfig
from skymoe.engine.division import context_limit, divide, planned_model
from skymoe.engine.shares import kv_heads_per_layer, layer_share, vocabulary_rows
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.presets import preset
from skymoe.spec.serving_plan import ServingPlan, write_serving_plan

SKYWORK = preset("skywork-moe")


def asked(**changes: Any) -> EngineConfig:
    return EngineConfig(model=Path("m"), **changes)


def covered(parts: list[range]) -> list[int]:
    return [unit for part in parts for unit in part]


def check(spec: ModelSpec, plan: ServingPlan) -> None:
    """Every layer: heads, columns and experts exactly once, key/value heads where their query heads are."""
    ranks, group = range(plan.num_ranks), spec.num_heads // spec.num_kv_heads
    assert covered(list(vocabulary_rows(plan))) == list(range(spec.vocab_size))
    for layer in range(spec.num_layers):
        shares = [layer_share(spec, plan, layer, rank) for rank in ranks]
        assert covered([share.heads for share in shares]) == list(range(spec.num_heads))
        for share in shares:
            assert set(share.kv_heads) == {head // group for head in share.heads}
        first = covered([share.kv_heads if share.holds_first else share.kv_heads[1:] for share in shares])
        assert sorted(first) == list(range(spec.num_kv_heads))
        if spec.is_moe_layer(layer):
            assert spec.moe is not None
            experts, columns = [share.experts for share in shares], [share.columns for share in shares]
            cut, whole = (columns, experts) if experts[0] == experts[-1] else (experts, columns)
            assert len(set(whole)) == 1
            assert covered(cut) + list(whole[0]) in (
                [*range(spec.moe.ffn_size), *range(spec.moe.num_experts)],
                [*range(spec.moe.num_experts), *range(spec.moe.ffn_size)],
            )
            assert covered([share.shared for share in shares]) == list(range(spec.moe.shared_ffn_size))
        else:
            assert covered([share.columns for share in shares]) == list(range(spec.ffn_size))


# ---- the paper's model on eight cards


def test_skywork_moe_on_8_ranks() -> None:
    plan = divide(SKYWORK, asked(tp=8), fp8_block=128)
    assert plan.split.heads == plan.split.kv_heads == (5, 5, 5, 5, 4, 4, 4, 4)
    assert plan.split.columns == (1536,) * 8 and plan.split.experts == (16,) * 8 and not plan.whole_experts
    assert plan.weights == "fp8" and plan.block == 128
    check(SKYWORK, plan)


def test_f5_rotation_gives_11_percent_more_room_for_keys_and_values() -> None:
    """The fork left 5 heads on ranks 0-3 in every layer, and those bounded the cache. Now every rank has 4.5."""
    held = {
        rotate: [sum(kv_heads_per_layer(SKYWORK, divide(SKYWORK, asked(tp=8, rotate=rotate)), r)) for r in range(8)]
        for rotate in (True, False)
    }
    assert held[False] == [260] * 4 + [208] * 4
    assert held[True] == [234] * 8
    assert max(held[False]) / max(held[True]) == pytest.approx(1.111, abs=1e-3)
    bytes_per_token = {rotate: max(heads) * 2 * 128 * 2 for rotate, heads in held.items()}  # bf16
    assert bytes_per_token == {True: 119_808, False: 133_120}


@pytest.mark.parametrize("tp", [5, 7, 9, 11, 36])
def test_f3_every_column_is_dealt_and_between_blocks(tp: int) -> None:
    """12288 columns on 5 ranks: the fork dropped 3 of them."""
    plan = divide(SKYWORK, asked(tp=tp), fp8_block=128)
    assert sum(plan.split.columns) == 12288 and not any(size % 128 for size in plan.split.columns)
    assert max(plan.split.columns) - min(plan.split.columns) <= 128
    check(SKYWORK, plan)


# ---- heads


def test_f4_key_value_heads_are_replicated_where_ranks_are_more() -> None:
    """Consecutive ranks share a key/value head: rank // replicas, which the fork had lost."""
    spec = preset("qwen3-30b-a3b")  # 32 heads on 4
    plan = divide(spec, asked(tp=8))
    assert plan.split.heads == (4,) * 8
    assert [list(layer_share(spec, plan, 0, rank).kv_heads) for rank in range(8)] == [
        [0], [0], [1], [1], [2], [2], [3], [3],
    ]  # fmt: skip
    check(spec, plan)
    uneven = divide(spec, asked(tp=6))
    assert uneven.split.heads == (4, 4, 4, 4, 8, 8) and uneven.split.kv_heads == (1,) * 6
    check(spec, uneven)


def test_groups_stay_whole_where_they_can() -> None:
    plan = divide(MODELS["qwen2"], asked(tp=3))  # 10 heads on 5
    assert plan.split.heads == (4, 4, 2) and plan.split.kv_heads == (2, 2, 1)
    assert [plan.heads(layer).sizes for layer in range(3)] == [(4, 4, 2), (4, 2, 4), (2, 4, 4)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tp": 10}, "--tp 9"),
        ({"split": ("heads=4,5",)}, "heads=3,6"),
        ({"split": ("heads=6,6",)}, "sums to 12, the model has 9"),
        ({"split": ("kv_heads=2,2",)}, "kv_heads=2,1"),
        ({"split": ("heads=6,3", "kv_heads=1,2")}, "contradict"),
        ({"split": ("kv_heads=2,1,0,0",)}, "--split heads="),
        ({"split": ("ffn=100,101",)}, "ffn=100,100"),
        ({"split": ("experts=1,0",)}, "--split ffn="),
        ({"split": ("heads=3,6",), "tp": 3}, "ranks differ"),
        ({"split": ("heads=3,6", "heads=6,3")}, "twice"),
        ({"split": ("head=3,6",)}, "heads, kv_heads"),
        ({"split": ("heads",)}, "heads=5,5,4"),
        ({"split": ("heads=3,x",)}, "no whole number"),
        ({"split": ("heads=3,-6",)}, "no whole number"),
        ({"split": ("heads=3,²",)}, "no whole number"),
        ({"split": ("heads=9,9999999999999999999",)}, "no whole number"),
        ({"split": ("weights=0,0",)}, "all are zero"),
        ({"split": ("weights=1,nan",)}, "no share"),
        ({"split": ("weights=1,inf",)}, "no share"),
        ({"split": ("weights=1,-1",)}, "no share"),
        ({"split": ("heads=" + ",".join(["0"] * 2000),)}, "more than 1024"),
        ({"max_model_len": 129}, "at most 128"),
    ],
)
def test_what_cannot_be_is_told_with_what_can(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        divide(MODELS["llama"], asked(**changes))
    assert told in str(error.value)


def test_ranks_without_heads_only_when_asked_for() -> None:
    plan = divide(MODELS["llama"], asked(split=("heads=3,6,0,0",)))
    assert plan.split.kv_heads == (1, 2, 0, 0)
    check(MODELS["llama"], plan)


# ---- columns, experts


def test_columns_of_200_on_3_ranks() -> None:
    plan = divide(MODELS["llama"], asked(tp=3))
    assert plan.split.columns == (67, 67, 66)
    assert [plan.columns(layer).sizes for layer in range(3)] == [(67, 67, 66), (67, 66, 67), (66, 67, 67)]


def test_fewer_blocks_than_ranks() -> None:
    """3 blocks of 128 and a last one of 16: three ranks have columns."""
    spec = ModelSpec(
        architecture=Architecture.LLAMA, vocab_size=64, hidden_size=128, num_layers=4, ffn_size=272, num_heads=4,
        num_kv_heads=4, head_dim=32,
    )  # fmt: skip
    plan = divide(spec, asked(tp=4), fp8_block=128)
    assert plan.split.columns == (128, 128, 16, 0)
    check(spec, plan)
    with pytest.raises(ConfigError, match="FP8"):
        divide(spec, asked(split=("ffn=100,172",)), fp8_block=128)


def test_whole_experts() -> None:
    spec = MODELS["skywork_moe"]
    plan = divide(spec, asked(split=("experts=6,5,5",)))
    assert plan.whole_experts and plan.split.columns == (28, 28, 28) and plan.rotate == ((0, 1, 2),)
    assert [plan.experts(layer).sizes for layer in range(3)] == [(6, 5, 5), (5, 6, 5), (5, 5, 6)]
    check(spec, plan)
    with pytest.raises(ConfigError, match="not both"):
        divide(spec, asked(split=("experts=8,8", "ffn=14,14")))
    with pytest.raises(ConfigError, match="experts=6,5,5"):
        divide(spec, asked(split=("experts=6,6,5",)))


def test_unequal_shares() -> None:
    plan = divide(SKYWORK, asked(split=("weights=24,24,12",)), fp8_block=128)
    assert plan.split.heads == (15, 14, 7) and plan.rotate == ((0, 1),)
    assert sum(plan.split.columns) == 12288 and plan.split.columns[2] == pytest.approx(12288 / 5, rel=0.02)
    check(SKYWORK, plan)


def test_a_split_by_hand_goes_round_only_where_it_is_even() -> None:
    def sizes(option: str) -> list[tuple[int, ...]]:
        plan = divide(MODELS["skywork_moe"], asked(split=(option,), tp=4))
        return [plan.heads(layer).sizes for layer in range(2)]

    assert sizes("heads=2,2,1,1") == [(2, 2, 1, 1), (1, 1, 2, 2)]
    assert sizes("heads=1,2,2,1") == [(1, 2, 2, 1)] * 2
    assert sizes("heads=3,1,1,1") == [(3, 1, 1, 1)] * 2


# ---- plans


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    made = divide(SKYWORK, asked(tp=8), fp8_block=128)
    write_serving_plan(made, tmp_path / "plan.json")
    assert divide(SKYWORK, asked(plan=tmp_path / "plan.json"), fp8_block=128) == made
    short = divide(SKYWORK, asked(plan=tmp_path / "plan.json", max_model_len=100, rotate=False))
    assert short.context == 100 and short.rotate == ()
    with pytest.raises(ConfigError, match="heads 36, here 9"):
        divide(MODELS["llama"], asked(plan=tmp_path / "plan.json"))
    with pytest.raises(ConfigError, match="plan is for 8 ranks"):
        divide(SKYWORK, asked(plan=tmp_path / "plan.json", tp=4))
    with pytest.raises(ConfigError, match="again"):
        divide(SKYWORK, asked(plan=tmp_path / "plan.json", split=("heads=36",)))
    (tmp_path / "plan.json").write_text('{"format": "skymoe-serving-plan", "version": 1}')
    with pytest.raises(FormatError):
        divide(SKYWORK, asked(plan=tmp_path / "plan.json"))


def test_a_plan_that_cuts_through_groups_is_refused(tmp_path: Path) -> None:
    plan = divide(MODELS["llama"], asked(tp=2))
    split = plan.split.model_copy(update={"heads": (4, 5), "kv_heads": (1, 2)})
    write_serving_plan(plan.model_copy(update={"split": split}), tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="group"):
        divide(MODELS["llama"], asked(plan=tmp_path / "plan.json"))


def test_the_model_of_a_plan() -> None:
    assert planned_model(SKYWORK).columns == 12288 and planned_model(MODELS["llama"]).experts == 1
    assert context_limit(SKYWORK) == SKYWORK.max_position


# ---- any model, any number of ranks


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_and_nothing_twice(data: st.DataObject) -> None:
    groups, group = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    moe = MoESpec(num_experts=data.draw(st.integers(2, 9)), top_k=1, ffn_size=data.draw(st.integers(1, 300)))
    width = data.draw(st.sampled_from((0, 8, 200)))
    spec = ModelSpec(
        architecture=Architecture.SKYMOE, vocab_size=data.draw(st.integers(1, 50)), hidden_size=8, num_layers=5,
        ffn_size=data.draw(st.integers(1, 300)), num_heads=groups * group, num_kv_heads=groups, head_dim=2,
        moe=data.draw(st.sampled_from((None, MoESpec(**{**vars(moe), "shared_ffn_size": width})))),
    )  # fmt: skip
    ranks = data.draw(st.integers(1, groups * group))
    split: tuple[str, ...] = ()
    if data.draw(st.booleans()):
        weights = data.draw(st.lists(st.integers(1, 9), min_size=ranks, max_size=ranks))
        split = (f"weights={','.join(map(str, weights))}",)
    block = data.draw(st.sampled_from((None, 16, 128)))
    plan = divide(spec, asked(tp=ranks, split=split, rotate=data.draw(st.booleans())), fp8_block=block)
    check(spec, plan)
    if not split:
        held = [sum(len(layer_share(spec, plan, i, r).heads) for i in range(5)) for r in range(ranks)]
        if plan.rotate and ranks <= groups:
            assert max(held) - min(held) <= group
