"""The machine of a case, in terms of the catalogue.

Tables spell one GPU in many ways ("A100-SXM-80GB", "h100_80gb", "H100-96GB HBM2e 500W (Grand Teton)"). A spelling is
matched to a type of the catalogue; memory, peak, size of a node and the network are then taken from the case where it
prints them, for they differ from site to site. Laws and link efficiencies stay those of the catalogue.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from skymoe.base.errors import ConfigError
from skymoe.plan.hardware.catalogue import find_gpu
from skymoe.plan.hardware.gpu import Cluster, Gpu, Link, Precision
from skymoe.plan.validate.cases import Case, NotJudgedError

_NVL72: Final = 72
_NETWORK_SHARE: Final = 0.8  # of the printed line rate that a collective reaches; as in the catalogue

_TYPES: Final = (
    (r"grand teton|h100.*96\s?gb", "h100-96g"),
    (r"a800", "a800-80g"),
    (r"a100.*40\s?_?gb", "a100-40g"),
    (r"a100", "a100-80g"),
    (r"h800", "h800-80g"),
    (r"h200", "h200"),
    (r"h100|sm90", "h100-80g"),
    (r"gb300", "gb300"),
    (r"b300", "b300"),
    (r"gb200", "gb200"),
    (r"b200|sm100", "b200"),
)


def catalogue_name(spelling: str) -> str:
    """The catalogue's name of a GPU as a table spells it. Raises NotJudgedError."""
    for pattern, name in _TYPES:
        if re.search(pattern, spelling, re.IGNORECASE) and "pcie" not in spelling.lower():
            return name
    try:
        return find_gpu(spelling).name
    except ConfigError as error:
        raise NotJudgedError(
            f"GPU {spelling!r} is not in the catalogue" if spelling else "the GPU is unknown"
        ) from error


def case_gpu(case: Case) -> Gpu:
    """The GPU of `case`, with the case's own memory, peak and network. Raises NotJudgedError."""
    gpu = find_gpu(catalogue_name(case.text("cluster.gpu")))
    memory = case.number("cluster.gpu_mem_gb", gpu.memory / 1e9, low=1, high=10_000)
    peak = dict(gpu.peak)
    printed = case.number("cluster.peak_dense_tflops", 0.0, high=1e6) * 1e12
    own = peak.get(Precision.BF16, 0.0)
    if printed and own and abs(printed / own - 1) > 0.02:  # 989 and 989.5 are one figure
        peak = {precision: value * printed / own for precision, value in peak.items()}
    network = _network(case.text("cluster.inter_node"), gpu.network, case.count("cluster.gpus_per_node", 8, high=1024))
    return replace(gpu, memory=memory * 1e9, peak=peak, network=network)


def case_cluster(case: Case, *, num_gpus: int | None = None) -> Cluster:
    """The cluster of `case`. Raises NotJudgedError."""
    gpu = case_gpu(case)
    count = case.count("cluster.num_gpus", num_gpus)
    per_node = case.count("cluster.gpus_per_node", gpu.gpus_per_node, high=1024)
    if "nvl72" in case.text("cluster.intra_node").lower():
        per_node = _NVL72
    return Cluster(gpu=gpu, num_gpus=count, gpus_per_node=per_node)


def _network(text: str, usual: Link, per_node: int) -> Link:
    """The line rate that the case prints, per GPU ("8x400Gb/s IB per node", "400Gb/s RDMA per GPU", "1600 Gbps ..").

    Gb are bits; "H100 80GB" is a memory.
    """
    found = re.search(r"(?:(\d{1,3})\s*x\s*)?(\d{2,5})\s*Gb", text)
    if found is None:
        return usual
    gigabits = int(found[1] or 1) * int(found[2])
    per_gpu = gigabits if "per GPU" in text else gigabits / per_node
    if not 1 <= per_gpu <= 10_000:
        return usual
    return Link(latency_s=usual.latency_s, bandwidth=_NETWORK_SHARE * per_gpu * 1e9 / 8)
