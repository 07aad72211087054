"""skymoe: grow a dense language model into a mixture of experts, train it, measure it.

`import skymoe` is cheap; torch is imported when `skymoe.load` is first asked for. One thing happens on import:
transformers, once it is loaded (before or after), knows `model_type: "skymoe"`; see `skymoe.integrations.hook`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skymoe.integrations import hook

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from skymoe.model.load import load


def __getattr__(name: str) -> object:
    if name == "load":
        from skymoe.model.load import load

        return load
    raise AttributeError(f"module 'skymoe' has no attribute {name!r}")


hook.install()
