"""The snippets of docs/simulator.md run, and the drawing beside them is what they make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from skymoe.plan.orders import interleaved
from skymoe.plan.simulator import simulate

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "simulator.md").read_text(encoding="utf-8")


def test_snippets_and_figure_6(tmp_path: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    made = (tmp_path / "plan_figure_6.svg").read_text(encoding="utf-8")
    assert made == (DOCS / "assets" / "plan_figure_6.svg").read_text(encoding="utf-8")


def test_drawings_of_the_page_are_well_formed() -> None:
    names = re.findall(r"!\[[^]]*\]\((assets/[^)]*)\)", PAGE)
    assert len(names) == 2
    for name in names:
        ElementTree.parse(DOCS / name)


def test_the_interleaved_column() -> None:
    """Table 6 of Qi et al. 2024 for the first and the last row; the other columns: test_orders_zero_bubble.py."""
    for said, setting, times, hop in (
        ("1.5B, 8, 24", (8, 3, 24), (18.522, 18.086, 9.337), 0.601),
        ("28.3B, 32, 256", (32, 2, 256), (10.402, 10.248, 7.698), 0.460),
    ):
        pp, chunks, num_micro = setting
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {said} |"))
        parts = [[seconds / chunks] * (pp * chunks) for seconds in times]
        rate = simulate(interleaved(pp, chunks, num_micro), *parts, hop_s=hop).bubble_of_longest_rank
        assert f"{rate:.4f}" == row.split("|")[7].strip()
