"""Profile: what a machine was measured to do, in place of what a catalogue says. Written by `skymoe plan profile`.

A profile holds two kinds of figures. Those of the *machine* (matrix products, memory, links, the optimizer) hold for
any model. Those of a *model* (seconds and kept bytes of each half layer, of the ends) hold for that model at that
number of tokens only, and are as good as it gets there: whatever the kernels and the framework add is in them. The
file's fields are described in docs/profile.md.

The file comes from anywhere, so it is read strictly: known fields only, finite and bounded numbers. No torch here.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from skymoe.base.config import Config
from skymoe.base.errors import FormatError, printable
from skymoe.base.strict_json import read_json_object
from skymoe.plan.hardware.gpu import Link, Precision

FORMAT, VERSION = "skymoe-profile", 1
_MAX_BYTES, _MAX_TOLD = 4 * 2**20, 5

Seconds = Annotated[float, Field(ge=0, le=1e6)]
Bytes = Annotated[float, Field(ge=0, le=1e15)]
Count = Annotated[int, Field(ge=1, le=2**40)]
Name = Annotated[str, Field(max_length=200)]


class LinkKind(StrEnum):
    """What is timed between ranks."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    P2P = "p2p"


class MachineFacts(Config):
    """Where and how it was measured."""

    device: Name
    title: Name
    memory: Bytes
    """bytes that a rank can have: its GPU's, or its share of the machine's"""
    ranks: Count
    """that worked at the same time, each with `threads` threads; figures are means over them"""
    threads: Count
    torch: Name
    load: float = Field(ge=0, le=1e6)
    """others' work while it was measured: load average (1 min) at the start"""
    clock: Literal["thread", "wall"]
    """seconds of the measuring thread's own work (one thread on a CPU), or of the wall"""


class Gemm(Config):
    """One matrix product (M, K) x (K, N)."""

    m: Count
    k: Count
    n: Count
    seconds: Seconds
    spread: float = Field(ge=0, le=1e6)
    """half the distance between the quartiles over the median"""


class Law(Config):
    """t = launch_s + sqrt((flops / rate)^2 + (bytes / bandwidth)^2), fitted to the products above."""

    rate: float = Field(gt=0, le=1e18)
    bandwidth: float = Field(gt=0, le=1e16)
    launch_s: Seconds
    error: float = Field(ge=0, le=1e3)
    """mean absolute relative error of the fit"""


class LinkFit(Config):
    """t = latency_s + factor * bytes / bandwidth, with factor 2(n-1)/n for all-reduce, (n-1)/n for the others, 1 p2p.

    bytes are those of the whole tensor: the result of an all-gather, the input of the others.
    """

    latency_s: Seconds
    bandwidth: float = Field(gt=0, le=1e16)
    points: tuple[tuple[Bytes, Seconds], ...] = Field(max_length=64)
    error: float = Field(ge=0, le=1e3)

    @property
    def link(self) -> Link:
        """As the planner counts."""
        return Link(latency_s=self.latency_s, bandwidth=self.bandwidth)


class Piece(Config):
    """A part of the model, one micro-batch."""

    forward_s: Seconds
    backward_s: Seconds
    again_forward_s: Seconds = 0.0
    """of the forward when the part is to be run again"""
    again_backward_s: Seconds = 0.0
    """of the backward that runs it again first"""
    kept: Bytes = 0.0
    """that autograd keeps from forward to backward, weights apart"""
    kept_again: Bytes = 0.0
    """that it keeps when the part is to be run again"""
    spread: float = Field(ge=0, le=1e6)

    @property
    def again_s(self) -> float:
        """What running it again adds."""
        return max(0.0, self.again_forward_s + self.again_backward_s - self.forward_s - self.backward_s)


class LayerKind(Config):
    """Layers of one kind, whole and by halves. A whole layer is not exactly its halves: `layer` is what counts."""

    is_moe: bool
    attention: Piece
    feed_forward: Piece
    layer: Piece


class ModelFacts(Config):
    """Of which model the pieces are, as far as their time depends on it."""

    name: Name
    hidden_size: Count
    vocab_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    ffn_size: Count
    num_experts: int = Field(ge=0, le=2**20)
    top_k: int = Field(ge=0, le=2**20)
    expert_size: int = Field(ge=0, le=2**40)
    shared_size: int = Field(ge=0, le=2**40)
    weights: Literal["random"]
    """random weights: routing is near balance, which a trained model's is not"""


class ModelTimes(Config):
    """Pieces of a model at a number of tokens."""

    model: ModelFacts
    sequence_length: Count
    micro_batch: Count
    precision: Precision
    kinds: tuple[LayerKind, ...] = Field(min_length=1, max_length=2)
    embedding: Piece
    head: Piece
    """the last norm, the head and the loss"""


class Profile(Config):
    """A profile file."""

    format: Literal["skymoe-profile"]
    version: Literal[1]
    machine: MachineFacts
    gemm: dict[Precision, tuple[Gemm, ...]]
    law: dict[Precision, Law]
    stream: float = Field(gt=0, le=1e16)
    """bytes per second that an addition of two vectors reads and writes"""
    links: dict[LinkKind, LinkFit]
    """empty when measured on one rank"""
    update_s: Seconds
    """of the optimizer, per parameter"""
    times: ModelTimes


def read_profile(path: Path) -> Profile:
    """The profile in `path`. Raises FormatError."""
    data = read_json_object(path, max_bytes=_MAX_BYTES)
    try:
        return Profile.model_validate_json(json.dumps(data))
    except ValidationError as error:
        told = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
    why = "; ".join(printable(line) for line in told[:_MAX_TOLD])
    raise FormatError("this is not a profile", where=path, why=why, hint="skymoe plan profile --model .. --out FILE")
