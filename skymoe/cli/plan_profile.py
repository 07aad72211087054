"""`skymoe plan profile`. Imports stand inside: `--help` must not wait for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Quiet, Seed, Verbose, given


def profile(
    model: Annotated[str, typer.Option(help="A model directory, or a preset; its shape, with random weights.")],
    out: Annotated[Path, typer.Option(help="The profile to write: profile.json.")],
    layers: Annotated[int | None, typer.Option(help="Layers of each kind that are built, and timed in a row.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences of a micro-batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, or cuda for a GPU per rank.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes that work, and talk, at the same time.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds; medians over them are written.")] = None,
    gemms: Annotated[int | None, typer.Option(help="Matrix products beside the model's own.")] = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time this machine's matrix products, layers, memory and links; the planner then prices by them."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, standard_output
    from skymoe.profile.config import ProfileConfig

    options = given(
        model=model, out=out, layers=layers, tokens=tokens, micro_batch=micro_batch, precision=precision,
        device=device, ranks=ranks, threads=threads, repeats=repeats, gemms=gemms, seed=seed,
    )  # fmt: skip
    config = check_config(ProfileConfig, options)
    from skymoe.profile.run import run
    from skymoe.profile.table import show

    found = run(config)
    print_json(found) if as_json else show(found, standard_output())
