"""Options that several commands share, and how options become a Config.

Options have no defaults on the command line: what is not given is left to the job's Config, where all defaults stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.base.log import setup_logging


def _quiet(asked: bool) -> None:
    if asked:
        setup_logging(-1)


def _verbose(asked: bool) -> None:
    if asked:
        setup_logging(1)


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings only.", callback=_quiet)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show details.", callback=_verbose)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Change single keys.")]
Extra = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the Config.")]
Split = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=A,B,..", help="Units per rank: heads=5,5,4, ffn=.., experts=..; or weights=3,1."),
]
PlanFile = Annotated[Path | None, typer.Option(help="A serving plan of `skymoe plan serve --save`.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same result.")]


def given(**options: object) -> dict[str, object]:
    """The options that the user gave: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}
