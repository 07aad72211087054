"""The section on speed: tokens per second, and what share of the machine that is."""

from __future__ import annotations

import numpy as np

from skymoe.base.html import el, join, table
from skymoe.report import charts
from skymoe.report.data import Material, Run
from skymoe.report.figure import figure
from skymoe.report.sections import Section, missing, swatch
from skymoe.report.series import Floats, tail_mean
from skymoe.report.verdict import NARROW, count, duration, scientific

DASH = "–"


def speed(material: Material, colors: dict[str, str], max_points: int) -> Section:
    """Tokens per second and what share of the machine that is."""
    chart = charts.speed_chart(material.runs, colors, max_points)
    if chart is None:
        return missing("speed", "Speed", "No training speed was logged.")
    cells = [_speed_cells(run) for run in material.runs]
    optional = {"devices", "per device", "HFU"}
    head = [name for name in cells[0] if name not in optional or any(row[name] != DASH for row in cells)]
    rows = [
        (swatch(run.name, colors[run.name]), *(row[name] for name in head))
        for run, row in zip(material.runs, cells, strict=True)
    ]
    text = (
        "MFU: model FLOPs per second over the peak of the machine. “Causal” counts the half of attention that is "
        "computed, “full” counts all of it."
    )
    if "HFU" in head:
        text += " HFU counts what is computed twice, too: recomputed layers, statistics passes."
    body = join([figure(chart), table(["run", *head], rows, label="Training speed"), el("p", text, class_="small")])
    return Section("speed", "Speed", body, (chart,))


def percent_of(share: float | None) -> str:
    """A share as a percentage; a dash for nothing."""
    return DASH if share is None else f"{share * 100:.1f}{NARROW}%"


def _speed_cells(run: Run) -> dict[str, str]:
    train = run.train
    last = {name: float(train[name][-1]) if len(train[name]) else None for name in ("tokens", "flops", "seconds")}
    share = {name: percent_of(tail_mean(train[name], 1.0)) for name in ("mfu_causal", "mfu_full", "hfu")}
    return {
        "tokens/s": count(median(train["tokens_per_s"])),
        "devices": str(run.world_size) if run.world_size > 1 else DASH,
        "per device": count(median(train["tokens_per_s_per_device"])) if run.world_size > 1 else DASH,
        "MFU causal": share["mfu_causal"],
        "MFU full": share["mfu_full"],
        "HFU": share["hfu"],
        "FLOPs/token": count(run.header.get("flops_per_token")),
        "compute": scientific(last["flops"]),
        "parameters": count(run.header.get("parameters")),
        "active": count(run.header.get("active_parameters")),
        "tokens": count(last["tokens"]),
        "time": duration(last["seconds"]),
    }


def median(values: Floats) -> float | None:
    """The middle of the known values, None without any."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None
