"""Bytes against equations of papers and published measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.memory.alive import alive_counts
from skymoe.plan.memory.model import rank_memory, sizes
from skymoe.plan.memory.runtime import PLAIN
from skymoe.plan.memory.sizes import RankMemory
from skymoe.plan.shape import AttentionShape, FfnShape, LayerShape, ModelShape, shape_of
from skymoe.plan.work import Division, Recompute, Work
from skymoe.spec.layout import DispatchMode, ScheduleKind
from skymoe.spec.presets import preset
from skymoe.spec.split import Split

CLUSTER = cluster_of("a100-80g", 64)


def gpt(num_layers: int, hidden: int, heads: int, vocabulary: int = 50304) -> ModelShape:
    width = hidden // heads
    attention = AttentionShape(num_heads=heads, num_kv_heads=heads, head_dim=width, value_dim=width)
    layer = LayerShape(attention=attention, ffn=FfnShape(inner=4 * hidden, gated=False))
    return ModelShape(
        name="gpt", hidden_size=hidden, vocab_size=vocabulary, layers=(layer,) * num_layers, tied=True, dropout=True,
        positions=2048,
    )  # fmt: skip


def work_of(shape: ModelShape, division: Division, sequence: int, micro: int = 1, **more: object) -> Work:
    settings: dict[str, object] = {"num_micro": 64, "flash": False, **more}
    return Work(
        shape=shape, division=division, cluster=CLUSTER, sequence_length=sequence, micro_batch=micro, **settings
    )  # type: ignore[arg-type]


def layer_bytes(work: Work) -> float:
    halves = sizes(work).halves
    return halves[0].activation + halves[1].activation


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.SELECTIVE])
def test_korthikanti_equations(tp: int, sp: bool, recompute: Recompute) -> None:
    """Equations 1 to 4: s b h (10 + 24/t + 5 a s/(h t)), s b h/t (34 + 5 a s/h), and without the last term."""
    s, b, h, a = 2048, 4, 6144, 64
    work = work_of(gpt(2, h, a), Division(pp=1, dp=1, tp=tp, sequence_parallel=sp), s, b, recompute=recompute)
    scores = 5 * a * s / h if recompute is Recompute.NONE else 0.0
    expected = s * b * h * ((34 + scores) / tp if sp else 10 + 24 / tp + scores / tp)
    assert layer_bytes(work) == pytest.approx(expected)


def first_stage(shape: ModelShape, pp: int, chunks: int, sp: bool, recompute: Recompute) -> float:
    division = Division(pp=pp, dp=1, tp=8, sequence_parallel=sp)
    work = work_of(shape, division, 2048, num_micro=8 * pp, recompute=recompute)
    stages = pp * chunks
    split = Split.even(2 * shape.num_layers, stages)
    schedule = ScheduleKind.INTERLEAVED if chunks > 1 else ScheduleKind.ONE_F_ONE_B
    ranks = rank_memory(work, sizes(work), split, (0,) * stages, schedule=schedule)
    return ranks[0].activations / 2**30


def test_korthikanti_first_stages() -> None:
    """Figure 1 and table 5, GiB: the factor 1 + (P - 1)/(P V) of interleaving is in the order itself."""
    none, selective = Recompute.NONE, Recompute.SELECTIVE
    assert first_stage(gpt(96, 12288, 96), 8, 3, False, none) == pytest.approx(66.84375)
    assert first_stage(gpt(105, 20480, 128), 35, 3, False, none) == pytest.approx(114.0234375)
    assert first_stage(gpt(105, 20480, 128), 35, 3, True, selective) == pytest.approx(23.076171875)
    assert first_stage(gpt(128, 25600, 160), 64, 1, False, none) == pytest.approx(131.25)
    assert first_stage(gpt(96, 12288, 96), 8, 3, True, selective) == pytest.approx(12.35, rel=1e-3)


def peak_gb(shape: ModelShape, pp: int, micro: int, sizes_of_stages: tuple[int, ...]) -> tuple[int, float]:
    division = Division(pp=pp, dp=1, tp=1, gradient_bytes=2)
    work = work_of(shape, division, 1024, micro)
    split = Split(sizes_of_stages).scaled(2)
    ranks = rank_memory(work, sizes(work), split, (0,) * pp, schedule=ScheduleKind.ONE_F_ONE_B)
    peaks = [rank.allocated / 1e9 for rank in ranks]
    return peaks.index(max(peaks)), max(peaks)


@pytest.mark.parametrize(
    ("hidden", "heads", "pp", "each", "micro", "measured"),
    [(2304, 24, 8, 3, 6, 30), (4096, 32, 8, 4, 3, 39), (5120, 40, 16, 3, 1, 32), (6144, 48, 32, 2, 1, 43)],
)
def test_zero_bubble_1f1b(hidden: int, heads: int, pp: int, each: int, micro: int, measured: float) -> None:
    """Qi et al. 2024, table 4, fp16: first and last stage have a layer less, so the second rank is the worst."""
    layers = (each - 1, *(each,) * (pp - 2), each - 1)
    rank, peak = peak_gb(gpt(sum(layers), hidden, heads), pp, micro, layers)
    assert rank == 1 and peak == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("sequence", "vocabulary", "measured"),
    [(2048, 256000, 25.64), (4096, 32000, 21.39), (4096, 128000, 25.78), (4096, 256000, 31.64)],
)
def test_vocabulary_parallelism_uniform(sequence: int, vocabulary: int, measured: float) -> None:
    """Yeung et al. 2025, table 5, GiB: the first rank is the worst; the gradient of a large embedding comes on top."""
    shape = replace(gpt(32, 3072, 24, vocabulary), positions=sequence, tied=False)
    work = work_of(shape, Division(pp=8, dp=1, tp=1, gradient_bytes=2), sequence, num_micro=128, flash=True)
    ranks = rank_memory(work, sizes(work), Split.even(64, 8), (0,) * 8, schedule=ScheduleKind.ONE_F_ONE_B)
    assert ranks[0].allocated / 2**30 == pytest.approx(measured, rel=0.01)
    assert ranks[0].allocated == max(rank.allocated for rank in ranks)


def deepseek_v3() -> ModelShape:
    attention = AttentionShape(
        num_heads=128, num_kv_heads=128, head_dim=192, value_dim=128, q_rank=1536, kv_rank=512, rope_dim=64
    )
    moe = FfnShape(inner=2048, num_experts=256, top_k=8, shared_inner=2048)
    layer = LayerShape(attention=attention, ffn=moe)
    return ModelShape(name="v3", hidden_size=7168, vocab_size=129280, layers=(layer,) * 61)


def test_deepseek_v3() -> None:
    """By hand, bytes per token and layer: norms 4 x 14336; q 6144 compressed and 49152, k 49152, v and o 32768 each,
    keys and values compressed 2176, log-sum-exp 512; router 1024; eight rows of 14336 + 3 x 4096; shared 12288."""
    division = Division(pp=4, dp=64, tp=1, ep=64, sequence_parallel=True)
    work = work_of(deepseek_v3(), division, 4096, num_micro=60, flash=True)
    by_hand = 57344 + 6144 + 49152 + 49152 + 2 * 32768 + 2176 + 512 + 1024 + 8 * (14336 + 12288) + 12288
    assert by_hand == 456_320
    assert layer_bytes(work) == pytest.approx(by_hand * 4096)
    alive = max(sum(counts) for counts in alive_counts(ScheduleKind.INTERLEAVED, 4, 16, 60)[0])
    assert alive == 19  # 2 (P - 1) + (V - 1) P + 1
    assert alive * 61 / 16 * layer_bytes(work) == pytest.approx(131e9, rel=0.05)  # what is published


def test_recomputation_keeps_less_at_every_level() -> None:
    shape = shape_of(preset("skywork-moe"))
    division = Division(pp=1, dp=8, tp=4, ep=4)
    kept = {
        level: layer_bytes(work_of(shape, division, 8192, recompute=level, flash=True))
        for level in (Recompute.NONE, Recompute.SELECTIVE, Recompute.MOE_ACT, Recompute.FULL)
    }
    stream = 8192 * 4608 * 2 / 4
    assert kept[Recompute.NONE] == kept[Recompute.SELECTIVE]  # fused attention stores no scores
    assert kept[Recompute.NONE] - kept[Recompute.MOE_ACT] == pytest.approx(2 * stream + 2 * 8192 / 4 * 12288 * 2)
    assert kept[Recompute.FULL] == stream


def test_skywork_layer_by_hand() -> None:
    """Eight residual-width tensors (four of the norms, q, k, v, o), log-sum-exp of nine heads, 16 logits, two rows."""
    work = work_of(shape_of(preset("skywork-moe")), Division(pp=1, dp=8, tp=4, ep=4), 8192, flash=True)
    per_token = (8 * 2 * 4608 + 4 * 36 + 4 * 16 + 2 * (2 * 4608 + 6 * 12288)) / 4
    assert layer_bytes(work) == pytest.approx(8192 * per_token)


def ffn_bytes_of(division: Division, **more: object) -> float:
    return sizes(work_of(shape_of(preset("skywork-moe")), division, 8192, flash=True, **more)).halves[1].activation


def test_experts_over_ranks() -> None:
    edp = Division(pp=1, dp=8, tp=4, ep=4)
    etp = replace(edp, ep=8, etp=4)
    rows = 8192 * 2 / 4
    assert ffn_bytes_of(etp) - ffn_bytes_of(edp) == pytest.approx(3 * rows * 2 * 4608)  # four times the rows, gathered
    more = ffn_bytes_of(edp, imbalance=1.5) - ffn_bytes_of(edp)
    assert more == pytest.approx(0.5 * rows * (2 * 4608 + 6 * 12288))
    assert ffn_bytes_of(edp, capacity=1.25, imbalance=9.0) == ffn_bytes_of(edp, imbalance=1.25)
    replicated = replace(edp, sequence_parallel=False, dispatch=DispatchMode.REPLICATED)
    assert ffn_bytes_of(replicated) - ffn_bytes_of(edp) == pytest.approx(0.75 * 8192 * (4 * 4608 + 4 * 16))


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "expected"), [(36, 36, 8, (5, 5)), (32, 8, 4, (8, 2)), (32, 2, 4, (8, 1))]
)
def test_uneven_heads_take_the_fullest_rank(heads: int, kv: int, tp: int, expected: tuple[int, int]) -> None:
    attention = AttentionShape(num_heads=heads, num_kv_heads=kv, head_dim=64, value_dim=64)
    layer = LayerShape(attention=attention, ffn=FfnShape(inner=512))
    shape = ModelShape(name="x", hidden_size=256, vocab_size=1000, layers=(layer,))
    half = sizes(work_of(shape, Division(pp=1, dp=1, tp=tp), 128, flash=True)).halves[0]
    q, k = expected
    assert half.weights == 2 * 256 * 64 * (2 * q + 2 * k)
    assert half.activation == 4 * 256 * 128 / tp + 128 * (64 * 2 * (2 * q + 2 * k) + 4 * q)


def test_head_and_embedding() -> None:
    shape = shape_of(preset("skywork-moe"))
    work = work_of(shape, Division(pp=12, dp=32, tp=4, ep=4), 8192, flash=True)
    found = sizes(work)
    assert found.head.transient == 8192 * 65536 / 4 * 6  # 3.2: 0.8 GB
    assert sizes(work, runtime=PLAIN).head.transient == 8192 * 65536 / 4 * 14
    assert found.head.weights == found.embedding.weights == 2 * 65536 / 4 * 4608
    assert found.embedding.optimizer == 12 * 65536 / 4 * 4608 / 32
    tied = replace(shape, tied=True)
    alone = replace(work, shape=tied, division=replace(work.division, pp=1))
    assert sizes(alone).head.static == 0
    assert sizes(replace(work, shape=tied)).head.static == found.head.static


def one(work: Work, split: tuple[int, ...], recompute: tuple[int, ...], **more: object) -> tuple[RankMemory, ...]:
    return rank_memory(work, sizes(work), Split(split), recompute, schedule=ScheduleKind.ONE_F_ONE_B, **more)  # type: ignore[arg-type]


def test_layers_run_again_leave_their_input() -> None:
    work = work_of(gpt(4, 256, 4), Division(pp=2, dp=1, tp=1), 128)
    half = sizes(work).halves
    layer, stream = half[0].activation + half[1].activation, half[0].checkpoint
    none, some = one(work, (4, 4), (0, 0))[0], one(work, (4, 4), (1, 0))[0]
    assert none.activations == 2 * 2 * layer
    assert some.activations == 2 * (layer + stream)
    cut = one(work, (3, 5), (2, 1))
    assert cut[0].activations == 2 * 2 * stream
    assert cut[1].activations == stream + 2 * layer + sizes(work).head.activation  # its half layer is run again, too


def test_full_recomputation_keeps_one_input_per_stage_and_layer() -> None:
    work = work_of(gpt(4, 256, 4), Division(pp=2, dp=1, tp=1), 128, recompute=Recompute.FULL)
    stream = 128 * 256 * 2
    whole, cut = one(work, (4, 4), (0, 0)), one(work, (3, 5), (0, 0))
    assert whole[0].activations == cut[0].activations == 2 * 2 * stream
    head = sizes(work).head.activation
    assert (whole[1].activations, cut[1].activations) == (2 * stream + head, 3 * stream + head)
    again = replace(work, recompute=Recompute.NONE)
    assert one(again, (4, 4), (2, 2))[0].activations == whole[0].activations


def test_alive_may_be_said() -> None:
    work = work_of(gpt(4, 256, 4), Division(pp=2, dp=1, tp=1), 128)
    twice, own = one(work, (4, 4), (0, 0), alive=(4, 2)), one(work, (4, 4), (0, 0))
    assert [a.activations / b.activations for a, b in zip(twice, own, strict=True)] == [2, 2]


def test_transients_meet_what_is_not_let_go_yet() -> None:
    """The logits meet everything; the embedding's gradient only what the other micro-batches left."""
    shape = replace(gpt(4, 256, 4, vocabulary=100_000), tied=False)
    work = work_of(shape, Division(pp=2, dp=1, tp=1), 64)
    first, last = one(work, (4, 4), (0, 0))
    assert last.transient == 64 * 100_000 * 6
    kept = first.activations / 2  # of one of the two micro-batches
    assert first.transient == sizes(work).embedding.transient - kept > 0


def test_zero_stages() -> None:
    shape = shape_of(preset("skywork-moe"))
    base = Division(pp=1, dp=32, tp=4, ep=4)
    static = {stage: sizes(work_of(shape, replace(base, zero_stage=stage), 8192)).halves[1] for stage in range(4)}
    whole = static[0].weights / 2
    assert static[0].gradients == 4 * whole and static[0].optimizer == 12 * whole
    assert static[1].optimizer == 12 * whole / 32 and static[1].gradients == 4 * whole
    assert static[2].gradients == 4 * whole / 32 and static[2].weights == 2 * whole
    assert static[3].weights == 2 * whole / 32
    assert static[3].transient - static[2].transient > 3 * 2 * whole  # gathered with the attention
    expert_dp = sizes(work_of(shape, replace(base, ep=16), 8192)).halves[1]  # experts are repeated 8 times only
    experts = 3 * 4608 * 12288
    assert expert_dp.optimizer == pytest.approx(12 * (experts / 8 + 4608 * 16 / 32))


def test_reserve_is_said_and_allocated_has_none_of_it() -> None:
    work = work_of(gpt(4, 256, 4), Division(pp=2, dp=4, tp=8), 128)
    rank = one(work, (4, 4), (0, 0))[0]
    assert rank.reserve == sizes(work).reserve == 1e9 + 3 * 0.4e9 + 0.02 * CLUSTER.gpu.memory
    assert rank.total - rank.allocated == rank.reserve
    assert sizes(replace(work, cluster=cluster_of("cpu", 2))).reserve == 0
