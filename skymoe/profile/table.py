"""The human form of a Profile: what a layer, the ends, products and links cost here."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.base.tables import plain_table
from skymoe.plan.hardware.profile import Piece, Profile


def show(profile: Profile, console: Console) -> None:
    """Print `profile`."""
    machine, times = profile.machine, profile.times
    console.print(Text(f"{printable(times.model.name)} on {printable(machine.title)}", style="bold"))
    ranks = f"{machine.ranks} ranks at the same time, {machine.threads} thread(s) each, load {machine.load:.1f}"
    batch = f"{times.micro_batch} x {times.sequence_length} tokens, {times.precision}, {times.model.weights} weights"
    console.print(Text(f"{batch}; {ranks}; seconds of the {machine.clock}'s clock"))
    for table in (_pieces(profile), _links(profile), _rest(profile)):
        console.print(table)


def _pieces(profile: Profile) -> Table:
    columns = ("part", "forward ms", "backward ms", "run again: + ms", "kept MiB", "run again: MiB", "spread")
    table = plain_table("model, per micro-batch", columns)
    for name, piece in _named(profile):
        again = bool(piece.again_forward_s)
        table.add_row(
            name, _ms(piece.forward_s), _ms(piece.backward_s), _ms(piece.again_s) if again else "",
            f"{piece.kept / 2**20:.2f}", f"{piece.kept_again / 2**20:.2f}" if again else "", f"{piece.spread:.0%}",
        )  # fmt: skip
    return table


def _named(profile: Profile) -> Iterator[tuple[str, Piece]]:
    for kind in profile.times.kinds:
        word = "MoE" if kind.is_moe else "dense"
        yield f"{word} layer", kind.layer
        yield f"{word}: attention half", kind.attention
        yield f"{word}: feed-forward half", kind.feed_forward
    yield "embedding", profile.times.embedding
    yield "head and loss", profile.times.head


def _links(profile: Profile) -> Table:
    table = plain_table(f"links, {profile.machine.ranks} ranks", ("what", "latency ms", "GB/s", "fit is off by"))
    for kind, fit in profile.links.items():
        table.add_row(kind, _ms(fit.latency_s), f"{fit.bandwidth / 1e9:.2f}", f"{fit.error:.0%}")
    return table


def _rest(profile: Profile) -> Table:
    table = plain_table("machine", ("what", "figure"))
    for precision, law in profile.law.items():
        figure = f"{law.rate / 1e9:,.0f} GFLOP/s, launch {law.launch_s * 1e6:.0f} us"
        table.add_row(f"matrix products, {precision}", f"{figure}; fit is off by {law.error:.0%}")
    table.add_row("memory", f"{profile.stream / 1e9:.1f} GB/s")
    table.add_row("optimizer", f"{profile.update_s * 1e9:.2f} ns per parameter")
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"
