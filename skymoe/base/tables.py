"""The table that commands print for people: a ruled heading, words to the left, figures to the right."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich import box
from rich.table import Table


def plain_table(title: str, columns: Sequence[str], *, left: Collection[str] | None = None) -> Table:
    """An empty table.

    Args:
        title: above it; "" for none.
        columns: their names.
        left: names of the columns of words; None: the first one.
    """
    words = columns[:1] if left is None else left
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table
