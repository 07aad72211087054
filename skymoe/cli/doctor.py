"""`skymoe doctor`: what this machine is and what torch can do on it. The first thing to put into a bug report."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import skymoe

_PACKAGES = (
    "torch", "safetensors", "numpy", "pydantic", "PyYAML", "typer", "rich",
    "tokenizers", "huggingface_hub", "pyarrow", "plotly", "tensorboard", "wandb",
)  # fmt: skip


@dataclass(frozen=True)
class DoctorReport:
    """One machine.

    Attributes:
        skymoe, python, platform: versions.
        packages: distribution -> version, or None when it is not installed (an extra).
        cpu: the instruction set that torch's kernels use.
        cores: cores this process may run on.
        threads: threads that torch uses.
        memory_bytes, memory_available_bytes: of the machine, or None where it does not say.
        disk_free_bytes: in the working directory.
        devices: accelerators by name.
        dtypes: what was tried -> works.
    """

    skymoe: str
    python: str
    platform: str
    packages: dict[str, str | None]
    cpu: str
    cores: int
    threads: int
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int
    devices: tuple[str, ...]
    dtypes: dict[str, bool]


def run() -> DoctorReport:
    """Look at the machine. Allocates a few kilobytes."""
    memory = _memory()
    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return DoctorReport(
        skymoe=skymoe.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in _PACKAGES},
        cpu=torch.backends.cpu.get_cpu_capability(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        devices=devices,
        dtypes=_dtypes("cuda" if devices else "cpu"),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if os.name == "posix" and platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> dict[str, int]:
    """Bytes by name from Linux's /proc/meminfo; empty elsewhere."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def _dtypes(device: str) -> dict[str, bool]:
    def matmul(dtype: torch.dtype) -> Callable[[], object]:
        x = torch.ones(16, 16, device=device)
        return lambda: x.to(dtype) @ x.to(dtype)

    def grouped(dtype: torch.dtype) -> Callable[[], object]:
        x, w = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(2, 16, 16, device=device, dtype=dtype)
        offsets = torch.tensor([8, 16], device=device, dtype=torch.int32)
        return lambda: torch.nn.functional.grouped_mm(x, w, offs=offsets)

    trials = {
        "float32 matmul": matmul(torch.float32),
        "bfloat16 matmul": matmul(torch.bfloat16),
        "float16 matmul": matmul(torch.float16),
        "float32 grouped matmul": grouped(torch.float32),
        "bfloat16 grouped matmul": grouped(torch.bfloat16),
        "float8_e4m3fn cast": lambda: torch.ones(16, device=device).to(torch.float8_e4m3fn).float(),
    }
    return {name: _works(trial) for name, trial in trials.items()}


def _works(trial: Callable[[], object]) -> bool:
    try:
        trial()
    except (RuntimeError, NotImplementedError):
        return False
    return True
