"""The catalogue: every entry is complete and sane; names are found, wrong ones are told the nearest."""

import pytest

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.catalogue import cluster_of, find_gpu, gpu_names, parse_gpus
from skymoe.plan.hardware.gpu import Precision


@pytest.mark.parametrize("name", gpu_names())
def test_entries_are_sane(name):
    gpu = find_gpu(name)
    peaks = [gpu.flops(precision) for precision in (Precision.FP32, Precision.BF16, Precision.FP8, Precision.NVFP4)]
    assert peaks == sorted(peaks)  # a narrower format is never slower
    assert 0 < gpu.reached(Precision.BF16) <= gpu.flops(Precision.BF16)
    assert gpu.network.bandwidth <= gpu.node.bandwidth
    assert 1e9 < gpu.memory < 1e12
    assert gpu.source and gpu.origin


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("A100-SXM-80GB", "a100-80g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("a800", "a800-80g"),
        ("H200-141GB", "h200"),
        ("RTX 6000 Pro Blackwell SE", "rtx6000-pro"),
        ("GB300", "gb300"),
    ],
)
def test_usual_spellings_are_found(spelling, name):
    assert find_gpu(spelling).name == name


def test_derived_gpus_differ_only_where_they_should():
    a100, a800 = find_gpu("a100-80g"), find_gpu("a800-80g")
    assert (a800.peak, a800.bandwidth, a800.memory) == (a100.peak, a100.bandwidth, a100.memory)
    assert a800.node.bandwidth == pytest.approx(a100.node.bandwidth * 400 / 600, rel=0.01)
    h100, h800 = find_gpu("h100-80g"), find_gpu("h800-80g")
    assert h800.node.bandwidth == pytest.approx(h100.node.bandwidth * 400 / 900, rel=0.01)


def test_a_format_that_a_gpu_lacks_is_computed_in_the_next_wider_one():
    a100 = find_gpu("a100-80g")
    assert a100.flops(Precision.FP8) == a100.flops(Precision.BF16) == 312e12
    assert find_gpu("cpu").computed_in(Precision.NVFP4) is Precision.FP32


def test_an_unknown_gpu_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="rtx4090") as refused:
        find_gpu("rtx40900")
    assert refused.value.exit_code == 2
    with pytest.raises(ConfigError, match="one of a100-80g"):
        find_gpu("\x1b[31mzzzzqqqq")
    with pytest.raises(ConfigError) as refused:
        find_gpu("z\n" * 100_000)
    assert len(str(refused.value)) < 1000


def test_lists_of_gpus():
    assert [gpu.name for gpu in parse_gpus("2xrtx4090, 1 x rtx3090,l4")] == ["rtx4090", "rtx4090", "rtx3090", "l4"]
    assert len(parse_gpus("1024xcpu")) == 1024


@pytest.mark.parametrize("text", ["", "4x", "0xcpu", "1025xcpu", "1000xcpu,25xcpu", "-1xcpu", "999999999999xcpu", ","])
def test_wrong_lists_are_refused(text):
    with pytest.raises(ConfigError):
        parse_gpus(text)


@pytest.mark.parametrize(("num_gpus", "per_node"), [(0, None), (-8, None), (8, 0), (10**9, None)])
def test_impossible_clusters_are_refused(num_gpus, per_node):
    with pytest.raises(ConfigError):
        cluster_of("h100-80g", num_gpus, per_node)


def test_neighbours_share_a_node():
    cluster = cluster_of("a100-80g", 64)
    assert [cluster.neighbours(8), cluster.neighbours(16), cluster.neighbours(16, 4), cluster.neighbours(4, 8)] == [
        8,
        8,
        2,
        1,
    ]
    assert cluster.link(8) == cluster.gpu.node
    assert cluster.link(16) == cluster.link(2, 8) == cluster.gpu.network
