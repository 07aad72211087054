"""May this run directory go on with this recipe?

Resuming is the same command again. What decides the values of later steps must be the same: the model, the data,
the batch, the optimizer, the precision, the seed. What only decides how long, how often and where may change. The
number of steps may too: a constant or steady rate does not depend on it, a cosine goes on along another curve, and
the run says so.

Data is identified by its fingerprint, not by its path, so a moved data set is the same data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skymoe.base.errors import ConfigError

_MAY_CHANGE = (
    "steps", "threads", "recompute", "parallel", "run.dir", "run.device", "data.train", "data.valid", "data.tokenizer",
    "checkpoint", "evaluate", "guard", "track", "log", "precision.peak_flops",
)  # fmt: skip


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> list[str]:
    """Compare two identities (`recipe`, `data`, `model`); returns the keys that changed and may.

    Raises:
        ConfigError: naming every key that may not change, with both values.
    """
    before, after = _flatten(saved["recipe"]), _flatten(now["recipe"])
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    forbidden = [key for key in changed if not _may_change(key, after)]
    told = [f"{key}: was {before.get(key)}, now {after.get(key)}" for key in forbidden]
    told += [
        f"{part}: was {saved[part]}, now {now[part]}"
        for part in ("data", "model")
        if not told and saved[part] != now[part]
    ]
    if told:
        raise ConfigError(
            "this run directory holds a run with another recipe:\n    " + "\n    ".join(told),
            where=where,
            why="going on with it would mix two runs",
            hint="restore these keys, or choose another run.dir",
        )
    return [key for key in changed if key not in ("run.dir", "track")]


def _may_change(key: str, recipe: Mapping[str, Any]) -> bool:
    if key == "batch.micro_sequences":  # other layouts need others; nothing depends on it but what is said here
        return recipe["balance.scope"] == "global" and recipe["balance.capacity"] == "virtual"
    return any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: item
        for key, child in value.items()
        for name, item in _flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }
