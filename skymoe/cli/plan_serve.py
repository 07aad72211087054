"""`skymoe plan serve`. Imports stand inside: `--help` must not wait for numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Quiet, Verbose, given


def serve(
    model: Annotated[str, typer.Option(help="A model directory, or a preset such as skywork-moe.")],
    gpus: Annotated[str, typer.Option(help="8xrtx4090, or 4xrtx4090,2xrtx3090 in the order of the ranks.")],
    weights: Annotated[str | None, typer.Option(help="bf16 (default), fp8, int8, int4, nvfp4, fp32.")] = None,
    kv: Annotated[str | None, typer.Option(help="Keys and values: bf16 (default), fp8, fp32.")] = None,
    context: Annotated[int | None, typer.Option(help="The longest sequence; default: 4096.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences at a time that are tried: 1,8,64.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a request's prompt; default: 128.")] = None,
    output: Annotated[int | None, typer.Option(help="Tokens of its answer; default: 128.")] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="A given division: heads=5,5,4 or ffn=, experts=, vocabulary=, weights=3,1."),
    ] = None,
    reserve: Annotated[float | None, typer.Option(help="GB of each GPU that stay free.")] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="The remainder goes round equal GPUs by layer.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="cut: a part of every expert on every GPU; whole.")] = None,
    objective: Annotated[str | None, typer.Option(help="throughput (default) or latency.")] = None,
    engine: Annotated[str | None, typer.Option(help="Whose overheads: skymoe, trtllm-engine, trtllm-pytorch.")] = None,
    price: Annotated[float | None, typer.Option(help="Money per GPU hour.")] = None,
    compare: Annotated[str | None, typer.Option(help="Another model on the same GPUs: llama-3-70b.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan file for `skymoe serve --plan`.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one offline page.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Divide a model over equal or unequal GPUs: what fits, and how many tokens a second it would give."""
    from skymoe.base.config import check_config
    from skymoe.base.errors import ConfigError
    from skymoe.cli.console import print_json, standard_output
    from skymoe.plan.serve.config import PlanServeConfig

    try:
        batches = None if batch is None else [int(item) for item in batch.split(",")]
    except ValueError as error:
        raise ConfigError(f"--batch {batch!r} is no list of numbers", hint="--batch 1,8,64") from error
    options = given(
        model=model, gpus=gpus, weights=weights, kv=kv, context=context, batch=batches, prompt=prompt, output=output,
        split=split or None, reserve=reserve, rotate=rotate, experts=experts, objective=objective, engine=engine,
        price=price, compare=compare, save=save, html=html,
    )  # fmt: skip
    config = check_config(PlanServeConfig, options, flags=True)
    from skymoe.plan.serve.run import run
    from skymoe.plan.serve.table import show

    report = run(config)
    print_json(report) if as_json else show(report, standard_output())
