"""What the user asks of `skymoe chat`."""

from __future__ import annotations

from pydantic import Field

from skymoe.base.config import Config
from skymoe.engine.config import EngineConfig
from skymoe.engine.params import MIN_REPETITION


class ChatConfig(Config):
    """A conversation in the terminal."""

    engine: EngineConfig
    """the model and how it is run; it needs `tokenizer.json` and a chat template"""
    system: str | None = None
    """what the model is told before the conversation"""
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """the most tokens of an answer; null until the context is full"""
    temperature: float = Field(default=0.7, ge=0, le=100)
    """0 takes the likeliest token"""
    top_k: int = Field(default=0, ge=0, lt=2**31)
    """sample among the k likeliest; 0 among all"""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """sample among the likeliest that sum to p"""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """drop tokens less than this fraction as likely as the likeliest"""
    repetition_penalty: float = Field(default=1.0, ge=MIN_REPETITION, le=10)
    """above 1 makes tokens of the conversation less likely"""
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """the same seed and the same words give the same conversation"""
