"""The human form of an InspectReport: a few tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.base.tables import plain_table
from skymoe.inspect.result import InspectReport, Spread

_WORDS = {
    "dense_ffn": "dense feed-forward", "experts": "routed experts", "shared": "shared experts",
    "attention_projections": "attention projections", "attention_scores": "attention scores",
}  # fmt: skip


def show(report: InspectReport, console: Console | None = None) -> None:
    """Print `report` to standard output (or `console`)."""
    console = console or Console(highlight=False)
    console.print(Text(printable(report.model), style="bold"))
    console.print(Text(_summary(report)))
    console.print()
    for table in (_parameters(report), _flops(report), _sizes(report)):
        console.print(table)
    if report.experts:
        console.print(_routers(report))
        console.print(_experts(report))
    elif report.shape.get("moe") and report.source == "directory":
        console.print("Router and expert statistics were not read.", style="dim")


def _summary(report: InspectReport) -> str:
    shape, moe = report.shape, report.shape.get("moe")
    words = [report.architecture, f"{shape['num_layers']} layers", f"width {shape['hidden_size']}"]
    heads = f"{shape['num_heads']} heads of {shape['head_dim']}"
    shared = shape["num_kv_heads"] != shape["num_heads"]
    words.append(f"{heads}, {shape['num_kv_heads']} for keys and values" if shared else heads)
    if moe:
        layers = len(shape["moe_layers"])
        where = "" if layers == shape["num_layers"] else f" in {layers} layers"
        gate = f", gate normalization (scale {moe['gate_norm']['scale']:g})" if moe["gate_norm"] else ""
        words.append(f"{moe['num_experts']} experts, top-{moe['top_k']}{where}{gate}")
    words += [f"context {shape['max_position']}", f"vocabulary {shape['vocab_size']}"]
    return " · ".join(words)


def _parameters(report: InspectReport) -> Table:
    table = plain_table("parameters", ("part", "parameters", "share"))
    for name, count in report.parameters_by_part.items():
        table.add_row(_WORDS.get(name, name), f"{count:,}", f"{count / report.parameters:.1%}")
    table.add_section()
    table.add_row("all", f"{report.parameters:,}", _count(report.parameters), style="bold")
    active = report.active_parameters
    table.add_row("active in one token", f"{active:,}", _count(active), style="bold")
    return table


def _flops(report: InspectReport) -> Table:
    flops = report.flops_per_token
    title = f"FLOPs per token, sequences of {flops.sequence_length}"
    table = plain_table(title, ("", "causal attention", "full attention"))
    for name, value in flops.parts.items():
        table.add_row(_WORDS.get(name, name), _flop(value), "", style="dim")
    table.add_section()
    table.add_row("forward", _flop(flops.forward_causal), _flop(flops.forward_full), style="bold")
    table.add_row("training step", _flop(flops.training_causal), _flop(flops.training_full), style="bold")
    return table


def _sizes(report: InspectReport) -> Table:
    table = plain_table("bytes", ("", "size"))
    sizes = report.bytes
    if sizes.on_disk is not None:
        kinds = ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.by_dtype.items())
        files = "1 file" if sizes.files == 1 else f"{sizes.files} files"
        table.add_row(f"on disk, {files} ({kinds})", _bytes(sizes.on_disk), style="bold")
    for name, size in sizes.weights.items():
        table.add_row(f"all weights as {name}", _bytes(size))
    for name, size in sizes.kv_cache_per_token.items():
        table.add_row(f"key/value cache per token as {name}", _bytes(size))
    return table


def _routers(report: InspectReport) -> Table:
    columns = ("layer", "row norm", "smallest", "largest", "row cosine", "smallest", "largest")
    table = plain_table("routers", columns)
    for figures in report.routers:
        table.add_row(str(figures.layer), *_cells(figures.row_norm), *_cells(figures.row_cosine))
    return table


def _experts(report: InspectReport) -> Table:
    columns = ("layer", "whole expert", "smallest", "largest", "gate", "up", "down")
    table = plain_table("expert similarity: pairwise cosine of the weights", columns)
    for layer in report.experts:
        means = (f"{part.mean:.4f}" for part in (layer.gate, layer.up, layer.down))
        table.add_row(str(layer.layer), *_cells(layer.all), *means)
    table.add_section()
    table.add_row("mean", f"{report.expert_similarity:.4f}", style="bold")
    return table


def _cells(spread: Spread) -> Iterable[str]:
    return (f"{value:.4f}" for value in (spread.mean, spread.min, spread.max))


def _count(value: float) -> str:
    return _scaled(value, ("T", "B", "M", "k"), "")


def _flop(value: float) -> str:
    return _scaled(value, (" T", " G", " M", " k"), "")


def _bytes(value: float) -> str:
    return _scaled(value, (" TB", " GB", " MB", " kB"), " B")


def _scaled(value: float, units: Sequence[str], smallest: str) -> str:
    for power, unit in zip((12, 9, 6, 3), units, strict=True):
        if value >= 10**power:
            return f"{value / 10**power:.2f}{unit}"
    return f"{value:.0f}{smallest}"
