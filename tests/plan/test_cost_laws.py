"""The laws against measured products and collectives, and their own algebra."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.plan.cost.collectives import Group, exposed
from skymoe.plan.cost.laws import Kernels
from skymoe.plan.hardware.catalogue import cluster_of, find_gpu
from skymoe.plan.hardware.gpu import Precision

# microsoft/vidur (MIT licence), data/profiling/compute/{a100,h100}/meta-llama/Llama-2-70b-hf/mlp.csv, medians:
# M, K, N, microseconds
MEASURED = {
    "a100-80g": [
        (1, 8192, 10240, 110.0), (64, 8192, 10240, 116.0), (256, 8192, 10240, 239.0), (1024, 8192, 10240, 802.5),
        (4096, 8192, 10240, 2872.0), (1, 8192, 2560, 32.0), (4096, 8192, 2560, 684.5), (64, 8192, 1280, 23.0),
        (256, 8192, 1280, 36.5), (4096, 8192, 1280, 348.0), (256, 2048, 8192, 62.0), (1024, 2048, 8192, 179.0),
        (64, 1024, 8192, 17.0), (1024, 1024, 8192, 79.0), (4096, 8192, 57344, 15940.5), (1, 8192, 14336, 150.0),
        (1024, 8192, 14336, 1115.5), (256, 8192, 7168, 154.0), (4096, 8192, 7168, 1931.0), (1, 28672, 8192, 290.0),
        (64, 28672, 8192, 307.0), (1024, 28672, 8192, 2254.0), (4096, 28672, 8192, 8063.5), (1, 3584, 8192, 41.0),
    ],
    "h100-80g": [
        (1, 8192, 10240, 63.0), (64, 8192, 10240, 61.5), (256, 8192, 10240, 87.5), (1, 8192, 2560, 19.0),
        (64, 8192, 2560, 21.0), (256, 8192, 2560, 33.0), (256, 8192, 1280, 21.0), (1024, 8192, 1280, 45.0),
        (64, 8192, 8192, 50.0), (4096, 8192, 8192, 788.5), (1, 2048, 8192, 16.0), (4096, 2048, 8192, 199.0),
        (256, 1024, 8192, 15.0), (4096, 1024, 8192, 94.0), (1024, 8192, 57344, 1383.5), (4096, 8192, 57344, 5668.5),
        (1, 8192, 14336, 81.0), (64, 8192, 7168, 45.0), (1024, 8192, 7168, 170.0), (1, 28672, 8192, 171.0),
        (256, 7168, 8192, 59.0), (256, 3584, 8192, 31.0), (1024, 3584, 8192, 83.0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_products_are_predicted(name):
    kernels = Kernels.of(find_gpu(name), Precision.BF16)
    errors = [abs(kernels.gemm(m, k, n) * 1e6 / measured - 1) for m, k, n, measured in MEASURED[name]]
    assert sum(errors) / len(errors) < 0.10


def test_all_reduces_within_a_node_are_predicted():
    """vidur's: A100 150 to 180, H100 320 to 380 GB/s of bus bandwidth at 64 MiB, alpha 45 to 50 and 25 to 30 us."""
    for name, ranks, alpha_us, gbps in [
        ("a100-80g", 2, 45, 170), ("a100-80g", 4, 50, 180), ("h100-80g", 2, 25, 320), ("h100-80g", 4, 30, 380),
    ]:  # fmt: skip
        size = 64 * 2**20
        measured = alpha_us * 1e-6 + 2 * (ranks - 1) / ranks * size / (gbps * 1e9)
        assert Group(cluster_of(name, 8), ranks).all_reduce(size) == pytest.approx(measured, rel=0.10)


def test_all_to_alls_between_nodes_are_predicted():
    """DeepEP on H100 with 400 Gb/s per GPU: 90 GB/s of tokens on 2 nodes of 8, 61 on 4, what stays included."""
    size = 1e9
    for nodes, gbps in ((2, 90), (4, 61)):
        cluster = cluster_of("h100-80g", 8 * nodes)
        assert size / Group(cluster, 8 * nodes).all_to_all(size) / 1e9 == pytest.approx(gbps, rel=0.10)
    assert size / Group(cluster_of("b200", 8), 8).all_to_all(size) / 1e9 == pytest.approx(733, rel=0.05)


@settings(deadline=None)
@given(m=st.integers(1, 10**5), k=st.integers(1, 10**5), n=st.integers(1, 10**5), precision=st.sampled_from(Precision))
def test_no_product_beats_the_machine(m, k, n, precision):
    gpu = find_gpu("b200")
    seconds = Kernels.of(gpu, precision).gemm(m, k, n)
    assert seconds >= 2 * m * k * n / gpu.flops(precision)
    assert seconds >= (m * k + k * n) * 0.5 / gpu.bandwidth


@settings(deadline=None)
@given(ranks=st.integers(2, 512), stride=st.integers(1, 64), size=st.floats(1, 1e12))
def test_collectives_are_consistent(ranks, stride, size):
    group = Group(cluster_of("h100-80g", 65_536), ranks, stride)
    gpu = group.cluster.gpu
    assert group.all_gather(size) == group.reduce_scatter(size)
    assert group.all_reduce(size) <= 2 * group.all_gather(size) + 1e-3
    # Never faster than what has to come in to a rank, on all its links together.
    least = size * (ranks - 1) / ranks / (gpu.node.bandwidth + gpu.network.bandwidth)
    assert group.all_gather(size) > least
    if group.neighbours == ranks:
        assert group.all_to_all(size) < group.all_gather(size) * 1.0001


def test_one_rank_and_nothing_cost_nothing():
    one, two = Group(cluster_of("cpu", 8), 1), Group(cluster_of("cpu", 8), 2)
    assert one.all_reduce(1e9) == one.all_gather(1e9) == one.all_to_all(1e9) == one.send(1e9) == 0
    assert two.all_reduce(0) == two.all_gather(0) == two.all_to_all(0) == 0


def test_a_gather_over_nodes_uses_the_cards_of_all_members():
    """Two nodes of two: a group of all four has two cards per node, groups of one GPU per node have one."""
    cluster = cluster_of("a800-80g", 4, 2)
    assert Group(cluster, 2, 2).all_gather(1e10) == pytest.approx(2 * Group(cluster, 4).all_gather(1e10), rel=0.01)


@settings(deadline=None)
@given(communication=st.floats(0, 10), cover=st.floats(0, 10))
def test_cover_hides_but_not_for_free(communication, cover):
    added = exposed(communication, cover)
    assert max(0.0, communication - cover) <= added <= communication
    assert exposed(communication, 0.0) == communication


def test_tokens_that_cross_to_a_node_once_are_cheaper_the_more_copies_they_have():
    """DeepEP: two nodes and eight choices: nearly every token crosses once instead of four times."""
    group, size = Group(cluster_of("h100-80g", 16), 16), 1e9
    alone, shared = (group.all_to_all(size, copies=copies) - group.latency_s for copies in (1, 8))
    assert shared / alone == pytest.approx(2 * (1 - 0.5**8) / 8, rel=1e-6)
    within = Group(cluster_of("h100-80g", 8), 8)
    assert within.all_to_all(size, copies=8) == within.all_to_all(size)
