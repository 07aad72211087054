"""Engine: the constants of inference engines, from `engines.yaml`; few, one set per engine, each with its origin."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config
from skymoe.base.document import parse_yaml
from skymoe.base.errors import ConfigError, printable

_FILE = Path(__file__).with_name("engines.yaml")


class Kernels(Config):
    """Factors on `memory` (and `kv_memory`), `gemm` and `layer_us` of an engine on one type of GPU."""

    memory: float = Field(default=1.0, gt=0, le=1.2)
    gemm: float = Field(default=1.0, gt=0, le=2)
    layer: float = Field(default=1.0, gt=0, le=10)


class Engine(Config):
    """An inference engine; the file explains the fields."""

    memory: float = Field(gt=0, le=1.2)
    kv_memory: float = Field(gt=0, le=1.2)
    gemm: float = Field(gt=0, le=1.5)
    narrow_memory: float = Field(default=1.0, gt=0, le=1.2)
    narrow_gemm: float = Field(default=1.0, gt=0, le=1.5)
    """further factors on `memory` and `gemm` where weights are stored in less than 16 bits and widened"""
    step_us: float = Field(ge=0)
    sequence_us: float = Field(ge=0)
    layer_us: float = Field(ge=0)
    latency: float = Field(ge=0)
    bus: float = Field(gt=0)
    max_batch: int = Field(ge=1)
    chunk: int = Field(ge=1)
    kv_fraction: float = Field(gt=0, le=1)
    reserve_gb: float = Field(ge=0)
    reserve: float = Field(ge=0, lt=1)
    weight_only: bool = False
    """narrow weights are widened and multiplied in 16 bits"""
    stage_sequence_us: float = Field(default=0.0, ge=0)
    """of every sequence in a step, when layers are divided over stages: its state travels"""
    on: dict[str, Kernels] = {}
    """types of GPU on which the kernels are known to reach less"""
    origin: str = Field(min_length=1)

    def kernels(self, gpu: str) -> Kernels:
        """On the GPU of the catalogue called `gpu`."""
        return self.on.get(gpu, _USUAL)

    def reserved(self, memory: float) -> float:
        """Bytes of a GPU with `memory` bytes that are for neither weights nor keys and values."""
        return self.reserve_gb * 1e9 + self.reserve * memory


_USUAL = Kernels()


class _File(Config):
    engines: dict[str, Engine]


def find_engine(name: str) -> Engine:
    """The engine called `name`.

    Raises:
        ConfigError: there is none.
    """
    engines = _engines()
    if name not in engines:
        near = difflib.get_close_matches(name[:100], engines, n=1)
        raise ConfigError(
            f"there is no engine {printable(name, 60)!r}", hint=near[0] if near else f"one of {', '.join(engines)}"
        )
    return engines[name]


@lru_cache(maxsize=1)
def _engines() -> dict[str, Engine]:
    return _File.model_validate(parse_yaml(_FILE.read_text(encoding="utf-8"), _FILE.name).data, strict=False).engines
