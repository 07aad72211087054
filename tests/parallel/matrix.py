"""Runs the equivalence matrix and writes docs/equivalence.md. Long: a case takes a few seconds on two cores.

    python tests/parallel/matrix.py                    the covering subset, as in CI
    python tests/parallel/matrix.py --strength 3       every triple of values that can be had together
    python tests/parallel/matrix.py --all              all cases; hours
    python tests/parallel/matrix.py --all --part 2/8   every eighth case, from the second

Results are kept one line a case (`--results`), so that a run that was cut off goes on where it stopped. Cases of one
world size share processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from parallel.covering import Case, all_cases, covering_subset
from parallel.equivalence import errors, on_rank
from parallel.equivalence_table import write_table
from parallel.ranks import run_ranks

_CASES_PER_WORLD = 12  # that share processes


def several_on_rank(cases: list[Case]) -> list[dict[str, Any]]:
    """One case after the other on the same ranks."""
    return [on_rank(case) for case in cases]


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for, small worlds first."""
    cases = all_cases() if arguments.all else covering_subset(arguments.strength)
    part, parts = map(int, arguments.part.split("/"))
    return sorted(cases, key=lambda case: (case.world_size, case))[part - 1 :: parts]


def run(cases: list[Case], results: Path) -> None:
    """Run what is not in `results` yet, and append it there."""
    done = {line["name"] for line in read(results)}
    left = [case for case in cases if str(case) not in done]
    print(f"{len(left)} cases to run, {len(cases) - len(left)} there already", flush=True)
    with results.open("a", encoding="utf-8") as file:
        for world_size, group in groupby(left, key=lambda case: case.world_size):
            alike = list(group)
            for start in range(0, len(alike), _CASES_PER_WORLD):
                batch = alike[start : start + _CASES_PER_WORLD]
                found = run_ranks(world_size, several_on_rank, batch, timeout_s=900)
                for case, of_ranks in zip(batch, zip(*found, strict=True), strict=True):
                    result = {**errors(case, list(of_ranks)), "name": str(case), "case": asdict(case)}
                    worst = max(result[key] for key in ("loss", "gradients", "weights", "alpha"))
                    print(f"{worst:.1e}  {case}", flush=True)
                    file.write(json.dumps(result) + "\n")
                file.flush()


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all legal cases")
    parser.add_argument("--strength", type=int, default=2, help="of the covering subset")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th case, from the i-th")
    parser.add_argument("--results", type=Path, default=Path("equivalence.jsonl"))
    parser.add_argument("--table", type=Path, help="the page to write, docs/equivalence.md")
    arguments = parser.parse_args()
    cases = chosen(arguments)
    run(cases, arguments.results)
    if arguments.table:
        wanted = {str(case) for case in cases}
        rows = [{**line["case"], **line} for line in read(arguments.results) if line["name"] in wanted]
        what = "--all" if arguments.all else f"--strength {arguments.strength}"
        write_table(
            rows, arguments.table, command=f"python tests/parallel/matrix.py {what} --table docs/equivalence.md"
        )


if __name__ == "__main__":
    main()
