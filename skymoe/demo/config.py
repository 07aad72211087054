"""What the user asks of `skymoe demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from skymoe.base.config import Config


class DemoConfig(Config):
    """One run of the demo.

    Attributes:
        out: directory for everything it makes. The same command on the same directory goes on where it stopped.
        seed: of the weights, the order of the text and the samples.
        quick: fewer steps: shows the way, not the result.
        corpus: `stdlib` reads the text that the running Python carries; `synthetic` makes some up, equal everywhere.
    """

    out: Path = Path("demo")
    seed: int = Field(default=0, ge=0, lt=2**31)
    quick: bool = False
    corpus: Literal["stdlib", "synthetic"] = "stdlib"
