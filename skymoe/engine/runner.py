"""Runner: one rank of an engine. It loads its share, takes room for keys and values, and runs steps.

How many pages there are is the least that any rank has room for: a page is a page on all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.errors import ConfigError, MachineError
from skymoe.engine.config import EngineConfig
from skymoe.engine.exchange import Exchange
from skymoe.engine.kv_cache import PagedCache, bytes_per_token, paged_batch
from skymoe.engine.load import load_share
from skymoe.engine.model import ServingModel
from skymoe.engine.shares import kv_heads_per_layer
from skymoe.engine.step import Chunk, StepPlan
from skymoe.ops.device import usable_device
from skymoe.spec.model import ModelSpec
from skymoe.spec.serving_plan import ServingPlan

_KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_KV_NAMES = {dtype: name for name, dtype in _KV_DTYPES.items()}
_MOST_PAGES = 1 << 31


class Runner:
    """A rank.

    Args:
        spec: the model.
        plan: its division.
        rank: this one.
        config: as the user gave it.
        loaded: is told how many layers are read, and how many there are.

    Attributes:
        num_pages: of the cache, after `connect`.
        max_model_len: the most tokens of a request, after `connect`.
        weights, kv_dtype: number formats.

    Raises:
        FormatError, ConfigError, MachineError: the model cannot be loaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: ServingPlan,
        rank: int,
        config: EngineConfig,
        *,
        loaded: Callable[[int, int], None] | None = None,
    ) -> None:
        self.spec, self.plan, self.rank, self.config = spec, plan, rank, config
        self.device = own_device(config.device, rank)
        self._share = load_share(config.model, spec, plan, rank, dtype=config.dtype, device=self.device, loaded=loaded)
        self.weights = self._share.weights
        self._kv_dtype = _kv_dtype(config, plan, self._share.dtype)
        self.kv_dtype = _KV_NAMES[self._kv_dtype]
        self._model: ServingModel | None = None
        self.num_pages = self.max_model_len = 0

    def connect(self, exchange: Exchange) -> None:
        """Meet the other ranks, agree on the number of pages, and take them.

        Raises:
            ConfigError, MachineError: there is not room for the longest request.
        """
        heads = kv_heads_per_layer(self.spec, self.plan, self.rank)
        own = self._room(bytes_per_token(heads, self.spec.head_dim, self._kv_dtype), exchange.size)
        self.num_pages = exchange.least(own)
        self.max_model_len = _longest(self.config, self.plan.context, self.num_pages)
        cache = PagedCache(
            heads, self.num_pages, self.config.page_size, self.spec.head_dim, self._kv_dtype, self.device
        )
        self._model = ServingModel(self.spec, self.plan, self._share, exchange, cache)
        self._warm_up(self._model)

    def _warm_up(self, model: ServingModel) -> None:
        """One token through all layers, in a page nobody has yet: what is compiled at first use is compiled now."""
        self.run(StepPlan((Chunk((0,), 0, (0,), 1),)))
        model.expert_tokens_LE.zero_()

    def run(self, step: StepPlan) -> Tensor | None:
        """One step; fp32 logits (R, V) on rank 0."""
        assert self._model is not None, "connect first"
        batch = paged_batch(step, self.config.page_size, self.device)
        tokens = torch.tensor([token for chunk in step.chunks for token in chunk.tokens])
        return self._model.forward(tokens.to(self.device), batch, logit_rows(step).to(self.device))

    def expert_tokens(self) -> list[list[int]]:
        """Tokens per expert since the start, one row per MoE layer; the same on every rank."""
        assert self._model is not None
        counts: list[list[int]] = self._model.expert_tokens_LE.tolist()
        return counts

    def _room(self, token_bytes: int, num_ranks: int) -> int:
        """Pages for which this rank has memory."""
        page_bytes = token_bytes * self.config.page_size
        if not page_bytes:
            return _MOST_PAGES
        free, asked = free_bytes(self.device, num_ranks), self.config.kv_memory_gb
        if asked is None:
            wanted = self.config.max_batch * -(-self.plan.context // self.config.page_size)
            return int(min(wanted, free // 2 // page_bytes))
        if asked * 1e9 > free:
            what = f"kv_memory_gb {asked:g}: for each of {num_ranks} ranks {free / 1e9:.3g} GB are free"
            raise MachineError(what, hint="a smaller kv_memory_gb, or leave it out")
        return int(asked * 1e9 // page_bytes)


def _kv_dtype(config: EngineConfig, plan: ServingPlan, of_activations: torch.dtype) -> torch.dtype:
    """Of the cache: as the user says, else as a plan file does, which has counted on it, else as the activations."""
    if config.kv_dtype != "auto":
        return _KV_DTYPES[config.kv_dtype]
    return of_activations if config.plan is None else _KV_DTYPES[plan.kv]


def logit_rows(step: StepPlan) -> Tensor:
    """Which rows of a step want logits: the last `num_logits` of each chunk."""
    rows: list[int] = []
    end = 0
    for chunk in step.chunks:
        end += len(chunk.tokens)
        rows += range(end - chunk.num_logits, end)
    return torch.tensor(rows, dtype=torch.int64)


def own_device(name: str, rank: int) -> torch.device:
    """The device of a rank: one GPU each.

    Raises:
        ConfigError, MachineError: there is none, or one was named for several ranks.
    """
    if rank and name.startswith("cuda:"):
        raise ConfigError(f"{name} is one GPU, and there are several ranks", where="device", hint="cuda: one GPU each")
    if name == "cuda":
        return usable_device(f"cuda:{rank}", where="device")
    return usable_device(name, where="device")


def threads_of(config: EngineConfig, num_ranks: int) -> int:
    """Threads of a rank: as the user says, else its part of the cores."""
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    return config.threads or max(cores // num_ranks, 1)


def free_bytes(device: torch.device, num_ranks: int) -> int:
    """Memory that is free: of the GPU, or this rank's part of the machine's (the container's, where that is less)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // num_ranks
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # "max": no limit
        limit = int((container / "memory.max").read_text())
        free = min(free, max(limit - int((container / "memory.current").read_text()), 0))
    return free // num_ranks


def _longest(config: EngineConfig, context: int, num_pages: int) -> int:
    """The most tokens of a request."""
    room = num_pages * config.page_size
    if room >= context:
        return context
    if config.max_model_len is not None:
        what = f"{room} tokens have room in the key/value cache, max_model_len is {context}"
        raise ConfigError(what, hint=f"raise kv_memory_gb, or max_model_len={room}" if room else "raise kv_memory_gb")
    if not room:
        raise MachineError("there is no memory for keys and values", hint="more ranks, or kv_memory_gb")
    return room
