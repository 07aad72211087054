"""What the user asks of `skymoe serve`: the engine, where it listens, who may talk to it, how much of everything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from skymoe.base.config import Config
from skymoe.engine.config import EngineConfig

MIB = 1 << 20

Seconds = Annotated[float, Field(gt=0, le=86400)]


class Limits(Config):
    """Bounds of what strangers may ask of the server. docs/serve_safety.md says what happens beyond each."""

    body_bytes: int = Field(default=2 * MIB, ge=1024, le=1 << 30)
    """of a request; beyond: 413"""
    bodies_bytes: int = Field(default=256 * MIB, ge=1024, le=1 << 40)
    """of all request bodies that are being read; beyond: 429"""
    header_bytes: int = Field(default=64 * 1024, ge=1024, le=MIB)
    """of a request line and its headers; beyond: 431"""
    header_s: Seconds = 10.0
    """for a request line and its headers to arrive; beyond: 408"""
    body_s: Seconds = 30.0
    """for a body to arrive; beyond: 408"""
    idle_s: Seconds = 5.0
    """a connection without a request is closed after so long"""
    write_s: Seconds = 30.0
    """a client that reads nothing of its answer for so long is cut off"""
    connections: int = Field(default=2048, ge=1, le=1 << 20)
    """open at once; beyond: 503"""
    waiting: int = Field(default=256, ge=0, le=1 << 20)
    """completions beyond those in the batch (`engine.max_batch`); beyond: 429"""
    tokens: int = Field(default=1 << 20, ge=1, le=1 << 40)
    """prompt tokens of all requests under way; beyond: 429"""
    choices: int = Field(default=128, ge=1, le=1 << 16)
    """completions of one request: prompts times `n`; beyond: 400"""
    template_s: Seconds = 2.0
    """for a chat template; beyond: 400"""


class ServeConfig(Config):
    """An engine, and the server before it."""

    engine: EngineConfig
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    """the address to listen on; other than loopback needs an API key"""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one"""
    name: str | None = Field(default=None, min_length=1, max_length=200)
    """of the model, in answers and requests; default: that of its directory"""
    api_key_file: Path | None = None
    """a file whose first line is the API key; or the environment variable SKYMOE_API_KEY"""
    insecure_no_auth: bool = False
    """listen beyond loopback without an API key"""
    drain_s: float = Field(default=30.0, ge=0, le=86400)
    """after SIGTERM, how long running requests may go on"""
    limits: Limits = Limits()
