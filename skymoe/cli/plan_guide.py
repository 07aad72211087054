"""`skymoe plan guide`. Imports stand inside: `--help` must not wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Quiet, Verbose, given


def guide(
    dense_tokens: Annotated[str, typer.Option(help="Tokens the dense model was trained on: 2T, 500B, 1.3e12.")],
    moe_tokens: Annotated[str, typer.Option(help="Tokens the mixture of experts shall be trained on.")],
    model: Annotated[str | None, typer.Option(help="The mixture, or its dense parent with --experts.")] = None,
    experts: Annotated[int | None, typer.Option(help="Of a dense model: how many.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of a dense model: experts per token; default: 2.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Context for the FLOP count.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Type of the catalogue: a800-80g, h100-80g, ...")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    tokens_per_s_per_gpu: Annotated[float | None, typer.Option(help="A measured or planned rate.")] = None,
    layout_from: Annotated[Path | None, typer.Option(help="A plan file whose expected rate is taken.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak where no rate is known; default: 0.32.")] = None,
    dense_peak_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the dense model.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upcycle or train from scratch: the rule on these budgets, its evidence, what to watch, GPU hours."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, standard_output
    from skymoe.plan.guide.config import GuideConfig

    options = given(
        dense_tokens=dense_tokens, moe_tokens=moe_tokens, model=model, experts=experts, top_k=top_k,
        sequence_length=sequence_length, gpu=gpu, gpus=gpus, tokens_per_s_per_gpu=tokens_per_s_per_gpu,
        layout_from=layout_from, mfu=mfu, dense_peak_lr=dense_peak_lr,
    )  # fmt: skip
    config = check_config(GuideConfig, options)
    from skymoe.plan.guide.run import run
    from skymoe.plan.guide.table import show

    report = run(config)
    print_json(report) if as_json else show(report, standard_output())
