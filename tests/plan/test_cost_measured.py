"""A measured profile in place of the laws: where it fits it counts, elsewhere its constants do."""

from dataclasses import replace

import pytest

from skymoe.plan.cost.model import prices, step_end
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.hardware.fitted import gpu_from_profile
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.hardware.profile import Profile
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Division, Recompute, Work
from skymoe.spec.presets import preset
from skymoe.spec.split import Split

SPEC = preset("demo-dense")


PROFILE = Profile.model_validate_json(
    """{"format": "skymoe-profile", "version": 1,
    "machine": {"device": "cpu", "title": "two cores", "memory": 8e9, "ranks": 2, "threads": 1, "torch": "2",
                "load": 0.0, "clock": "thread"},
    "gemm": {"fp32": [{"m": 8, "k": 8, "n": 8, "seconds": 1e-5, "spread": 0.0}]},
    "law": {"fp32": {"rate": 5e10, "bandwidth": 1e10, "launch_s": 1e-5, "error": 0.1}},
    "stream": 2e10,
    "links": {"all_reduce": {"latency_s": 1e-3, "bandwidth": 5e8, "points": [], "error": 0.1},
              "p2p": {"latency_s": 2e-4, "bandwidth": 1e9, "points": [], "error": 0.1}},
    "update_s": 1e-9,
    "times": {"model": {"name": "demo", "hidden_size": 128, "vocab_size": 2048, "num_heads": 2, "num_kv_heads": 2,
                        "head_dim": 64, "ffn_size": 384, "num_experts": 0, "top_k": 0, "expert_size": 0,
                        "shared_size": 0, "weights": "random"},
              "sequence_length": 256, "micro_batch": 4, "precision": "fp32",
              "kinds": [{"is_moe": false, "attention": ATTENTION, "feed_forward": FFN, "layer": LAYER}],
              "embedding": ENDS, "head": ENDS}}""".replace(
        "ATTENTION", '{"forward_s": 0.010, "backward_s": 0.020, "spread": 0}'
    )
    .replace("FFN", '{"forward_s": 0.020, "backward_s": 0.040, "spread": 0}')
    .replace("LAYER", '{"forward_s": 0.033, "backward_s": 0.066, "spread": 0}')
    .replace("ENDS", '{"forward_s": 0.005, "backward_s": 0.007, "spread": 0}')
)


def work(**changes):
    base = Work(
        shape=shape_of(SPEC), division=Division(pp=2, dp=1, tp=1, sequence_parallel=False, weight_bytes=4.0),
        cluster=cluster_of("cpu", 2), sequence_length=256, micro_batch=4, num_micro=8, precision=Precision.FP32,
    )  # fmt: skip
    return replace(base, **changes)


def test_measured_halves_make_the_measured_layer():
    listed = prices(work(), PROFILE)
    attention, ffn = listed.halves[:2]
    assert (attention.forward_s, ffn.forward_s) == pytest.approx((0.011, 0.022))
    assert attention.backward_s + ffn.backward_s == pytest.approx(0.066)
    assert (listed.head.forward_s, listed.head.backward_s) == pytest.approx((0.005, 0.007))
    for price in (attention, ffn, listed.head):
        assert sum(price.parts.values()) == pytest.approx(price.forward_s + price.backward_s)
        assert 0 < price.weight_s < price.backward_s


def test_recomputation_runs_the_measured_forward_again():
    plain, full = (prices(work(recompute=level), PROFILE) for level in (Recompute.NONE, Recompute.FULL))
    again = sum(half.again_s for half in plain.halves[:2])
    assert again == pytest.approx(0.033, rel=0.1)
    added = sum(f.backward_s - p.backward_s for f, p in zip(full.halves[:2], plain.halves[:2], strict=True))
    assert added == pytest.approx(again)
    assert sum(half.again_s for half in full.halves) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_length": 512},
        {"micro_batch": 2},
        {"shape": shape_of(preset("llama-3-8b"))},
        {"division": Division(pp=1, dp=1, tp=2, sequence_parallel=False)},
    ],
)
def test_of_another_work_only_the_constants_are_taken(changes):
    other = work(**changes)
    on_machine = replace(other, cluster=replace(other.cluster, gpu=gpu_from_profile(PROFILE)))
    assert prices(other, PROFILE) == prices(on_machine)
    assert prices(other, PROFILE) != prices(other)


def test_constants_are_those_that_were_fitted():
    gpu = gpu_from_profile(PROFILE)
    assert gpu.reached(Precision.FP32) == 5e10
    assert gpu.laws.memory * gpu.bandwidth == 2e10
    assert (gpu.node.latency_s, gpu.node.bandwidth) == (1e-3, 5e8)
    assert gpu.memory == 8e9
    # From rank to rank: what was measured between two.
    sent = 2.0**20 * 0.5  # 1024 tokens x 128 x 4 bytes
    assert prices(work(), PROFILE).hop_s == pytest.approx(2e-4 + sent / 1e9)


def test_the_measured_optimizer_counts():
    end = step_end(work(), Split((4, 4)), pipeline_s=1.0, update_s=PROFILE.update_s)
    assert end.update_s == pytest.approx(1e-9 * (2 * (4 * 128 * 128 + 3 * 128 * 384) + 2048 * 128), rel=0.01)
