"""The catalogue of GPUs: `gpus.yaml` read strictly, names as they stand on a command line.

find_gpu("a100-80g")             a Gpu; also by other spellings: "A100-SXM-80GB", "NVIDIA GeForce RTX 4090"
cluster_of("a800-80g", 1536)     equal GPUs in nodes
parse_gpus("4xrtx4090,2xrtx3090")  a list of them, not necessarily equal
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.document import parse_yaml
from skymoe.base.errors import ConfigError, printable
from skymoe.plan.hardware.gpu import Cluster, Gpu, Laws, Link, Precision

MAX_GPUS = 1_000_000
_MAX_LISTED = 1_024
_FILE = Path(__file__).with_name("gpus.yaml")


class _LinkRow(Config):
    latency_us: float = Field(ge=0)
    gbps: float = Field(gt=0)


class _LawsRow(Config):
    gemm: float = Field(gt=0, le=1)
    gemm_narrow: float = Field(gt=0, le=1)
    memory: float = Field(gt=0, le=1)
    launch_us: float = Field(ge=0)
    attention: float = Field(gt=0, le=1)
    host_us: float = Field(default=0.0, ge=0)


class _GpuRow(Config):
    title: str
    aliases: tuple[str | int, ...] = ()
    memory_gib: float = Field(gt=0)
    peak_tflops: dict[Precision, float]
    bandwidth_gbps: float = Field(gt=0)
    node: _LinkRow
    network: _LinkRow
    gpus_per_node: int = Field(ge=1)
    laws: _LawsRow
    source: str = Field(min_length=1)
    origin: str = Field(min_length=1)


class _File(Config):
    gpus: dict[str, _GpuRow]


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, in any usual spelling.

    Raises:
        ConfigError: not in the catalogue; the hint names the closest ones.
    """
    gpus, spellings = _catalogue()
    key = _spelling(name)
    if key in spellings:
        return gpus[spellings[key]]
    near = [spellings[spelling] for spelling in difflib.get_close_matches(key, spellings, n=4, cutoff=0.5)]
    hint = " or ".join(dict.fromkeys(near)) or f"one of {', '.join(gpus)}"
    raise ConfigError(f"there is no GPU {printable(name, 60)!r} in the catalogue", hint=hint)


def gpu_names() -> tuple[str, ...]:
    """All names of the catalogue, in its order."""
    return tuple(_catalogue()[0])


def cluster_of(name: str, num_gpus: int, gpus_per_node: int | None = None) -> Cluster:
    """`num_gpus` equal GPUs in nodes of `gpus_per_node` (as they are usually built).

    Raises:
        ConfigError: unknown GPU, or numbers out of range.
    """
    gpu = find_gpu(name)
    per_node = gpu.gpus_per_node if gpus_per_node is None else gpus_per_node
    for what, number in (("GPUs", num_gpus), ("GPUs per node", per_node)):
        if not 1 <= number <= MAX_GPUS:
            raise ConfigError(f"the number of {what} must be from 1 to {MAX_GPUS}, got {number}")
    return Cluster(gpu=gpu, num_gpus=num_gpus, gpus_per_node=per_node)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs one by one: "8xrtx4090" or "4xrtx4090,2xrtx3090"; without a number, one.

    Raises:
        ConfigError: an unknown GPU, no GPU, more than 1024.
    """
    found: list[Gpu] = []
    for item in text.split(",") if len(text) <= 10_000 else [text]:
        match = re.fullmatch(r"\s*(?:(\d{1,9})\s*[xX*]\s*)?(\S(?:.*\S)?)\s*", item[:200])
        if match is None:
            raise ConfigError(f"cannot read the GPUs {printable(text, 80)!r}", hint="4xrtx4090,2xrtx3090")
        number, gpu = int(match[1] or 1), find_gpu(match[2])
        if not 1 <= number <= _MAX_LISTED - len(found):
            raise ConfigError(f"from 1 to {_MAX_LISTED} GPUs can be listed, got {printable(text, 80)!r}")
        found += [gpu] * number
    return tuple(found)


@lru_cache(maxsize=1)
def _catalogue() -> tuple[Mapping[str, Gpu], Mapping[str, str]]:
    """GPUs by name, and names by spelling."""
    document = parse_yaml(_FILE.read_text(encoding="utf-8"), _FILE.name)
    rows = _File.model_validate(document.data, strict=False).gpus
    gpus = {name: _gpu(name, row) for name, row in rows.items()}
    spellings: dict[str, str] = {}
    for name, row in rows.items():
        for spelling in (name, row.title, *row.aliases):
            spellings.setdefault(_spelling(str(spelling)), name)
    return MappingProxyType(gpus), MappingProxyType(spellings)


def _spelling(name: str) -> str:
    """Without the maker's name, case and what stands between words."""
    return re.sub(r"[^a-z0-9]", "", name[:200].lower().replace("nvidia", "").replace("tesla", ""))


def _gpu(name: str, row: _GpuRow) -> Gpu:
    peak = {precision: tflops * 1e12 for precision, tflops in row.peak_tflops.items()}
    return Gpu(
        name=name,
        title=row.title,
        memory=row.memory_gib * 2**30,
        peak=peak,
        bandwidth=row.bandwidth_gbps * 1e9,
        node=Link(latency_s=row.node.latency_us * 1e-6, bandwidth=row.node.gbps * 1e9),
        network=Link(latency_s=row.network.latency_us * 1e-6, bandwidth=row.network.gbps * 1e9),
        gpus_per_node=row.gpus_per_node,
        laws=Laws(
            gemm=row.laws.gemm,
            gemm_narrow=row.laws.gemm_narrow,
            memory=row.laws.memory,
            launch_s=row.laws.launch_us * 1e-6,
            attention=row.laws.attention,
            host_s=row.laws.host_us * 1e-6,
        ),
        source=row.source,
        origin=row.origin,
    )
