"""Cases that say "same mapping as table 3": their division is that of another case of the file, which is looked up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from skymoe.plan.validate.cases import Case

_AXES: Final = ("tp", "pp", "vp", "cp", "ep", "etp")


def with_mappings(cases: Sequence[Case]) -> tuple[Case, ...]:
    """`cases`, those that refer to another's mapping with its axes; dp follows from the number of GPUs."""
    written = {_key(case): case for case in cases if case.has("parallel.tp") and case.has("parallel.pp")}
    return tuple(_resolved(case, written) if _refers(case) else case for case in cases)


def _refers(case: Case) -> bool:
    return not case.has("parallel.tp") and re.match(r"same mapping", case.text("parallel.note")) is not None


def _key(case: Case) -> tuple[str, str, str]:
    return case.group, case.text("model.name"), case.text("parallel.method")


def _resolved(case: Case, written: dict[tuple[str, str, str], Case]) -> Case:
    source = written.get(_key(case))
    parallel: Any = case.get("parallel")
    if source is None:
        return replace(case, fields={**case.fields, "parallel": None})
    axes = {axis: source.get(f"parallel.{axis}") for axis in _AXES}
    return replace(case, fields={**case.fields, "parallel": {**parallel, **axes, "dp": None}})
