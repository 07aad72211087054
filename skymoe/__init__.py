"""skymoe: grow a dense language model into a mixture of experts, train it, measure it.

`import skymoe` is cheap; torch is imported when `skymoe.load` or `skymoe.LLM` is first asked for. One thing happens on
import: transformers, once it is loaded (before or after), knows `model_type: "skymoe"`; see `skymoe.integrations.hook`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from skymoe.integrations import hook

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__", "load"]

if TYPE_CHECKING:
    from skymoe.engine.llm import LLM
    from skymoe.engine.params import SamplingParams
    from skymoe.model.load import load

_HOMES = {"LLM": "skymoe.engine.llm", "SamplingParams": "skymoe.engine.params", "load": "skymoe.model.load"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'skymoe' has no attribute {name!r}")


hook.install()
