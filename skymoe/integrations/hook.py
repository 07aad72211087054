"""`import skymoe` makes transformers know `model_type: "skymoe"`, without importing transformers.

A directory exported as `skymoe` then loads by `AutoModelForCausalLM.from_pretrained(...)` with the code of the
installed package, and no `trust_remote_code`. Loading transformers for that would cost every command seconds, so:

- if transformers' AutoConfig is loaded already, it is told at once;
- if not, a finder at the head of `sys.meta_path` waits for the module that defines it, finds that by the finders behind
  it, lets it run, and then tells it. It answers for no other module.

The order of the imports does not matter, a reloaded module is told again, and where transformers is not installed
nothing happens. Should registering fail (another version of transformers), the import of transformers still succeeds,
and a warning says that `skymoe` models need `trust_remote_code`. The standard library only: every `import skymoe` loads
this module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AWAITED = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Do what this module is for. Harmless twice, also after this module was reloaded."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__qualname__ != _SkymoeFinder.__qualname__]
    sys.meta_path.insert(0, _SkymoeFinder())
    if _AWAITED in sys.modules:
        _tell()


class _SkymoeFinder:
    """Finds what the finders behind it find, and adds our registration to it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        for finder in [finder for finder in sys.meta_path if not isinstance(finder, _SkymoeFinder)]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Runs a module by its own loader, after handing the module back to that, and registers."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # nobody sees that we were here
        self._loader.exec_module(module)
        _tell()


def _tell() -> None:
    try:
        import_module("skymoe.integrations.transformers").register_config()
    except Exception as error:  # whatever it is, it must not break the user's import of transformers
        told = f"skymoe could not register its models, transformers will need trust_remote_code for them: {error}"
        warnings.warn(told, RuntimeWarning, stacklevel=2)
