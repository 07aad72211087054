"""`skymoe plan validate`: predictions beside published measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Quiet, Verbose, given


def validate(
    cases: Annotated[Path, typer.Option(help="A JSON file of measured cases; see docs/plan_accuracy.md.")],
    group: Annotated[list[str] | None, typer.Option(help="Only this group; may be repeated.")] = None,
    worst: Annotated[int | None, typer.Option(min=0, help="How many of the largest errors to show.")] = None,
    write_docs: Annotated[Path | None, typer.Option(help="Write the accuracy page (Markdown) to this file.")] = None,
    write_accuracy: Annotated[
        Path | None, typer.Option(help="Write the figures that plans say about themselves (JSON) to this file.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Predict published measurements, and say how far the predictions are off."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, standard_output
    from skymoe.plan.validate.config import ValidateConfig
    from skymoe.plan.validate.run import run
    from skymoe.plan.validate.table import show

    options = given(
        cases=cases, groups=tuple(group) if group else None, worst=worst, write_docs=write_docs,
        write_accuracy=write_accuracy,
    )  # fmt: skip
    config = check_config(ValidateConfig, options, flags={"groups": "--group"})
    report = run(config)
    if as_json:
        print_json(report.as_json(worst=config.worst))
    else:
        show(report, standard_output(), worst=config.worst)
