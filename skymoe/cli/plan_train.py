"""`skymoe plan train`. Imports stand inside: `--help` must not wait for numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Quiet, Verbose, given


def train(
    model: Annotated[str, typer.Option(help="A model directory, or a preset such as skywork-moe.")],
    gpus: Annotated[int, typer.Option(help="How many GPUs there are; all are used.")],
    gpu: Annotated[str | None, typer.Option(help="Type: a800-80g (default), h100-80g, rtx4090, cpu, ..")] = None,
    nodes_of: Annotated[int | None, typer.Option(help="GPUs of a node; default: as usual for the type.")] = None,
    memory: Annotated[float | None, typer.Option(help="GB of a GPU that may be used; default: all.")] = None,
    profile: Annotated[Path | None, typer.Option(help="A file of `skymoe plan profile`.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline ranks. What is not given is searched.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel replicas.")] = None,
    expert: Annotated[str | None, typer.Option(help="Expert axis: edp, ep or etp.")] = None,
    dispatch: Annotated[str | None, typer.Option(help="Way of the tokens: A, G or R.")] = None,
    schedule: Annotated[str | None, typer.Option(help="1f1b, interleaved or zbv.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank of interleaved.")] = None,
    recompute: Annotated[
        str | None, typer.Option(help="auto (default), none, selective, moe_act, full; see docs/plan.md.")
    ] = None,
    whole_layers: Annotated[
        bool | None, typer.Option("--whole-layers/--halves", help="Where stages may end; default: halves.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: the context, at most 8192.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences of a micro-batch; default: 1, 2 or 4.")] = None,
    global_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step; default: about 1024 sequences.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 (default), fp8, fp32, ..")] = None,
    imbalance: Annotated[float | None, typer.Option(help="Load of the fullest expert rank over the mean.")] = None,
    capacity: Annotated[float | None, typer.Option(help="Capacity factor, where tokens are dropped.")] = None,
    vocabulary_parallel: Annotated[
        bool | None, typer.Option("--vocabulary-parallel/--no-vocabulary-parallel", help="Say what that would give.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="How many runners-up are listed.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan file that `skymoe train` replays.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one offline page.")] = None,
    out: Annotated[Path | None, typer.Option(help="A directory for plan file, report and page.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the fastest layout for N GPUs: ranks per axis, layers per stage, what is run again; and say why."""
    from skymoe.base.config import check_config
    from skymoe.base.log import logger
    from skymoe.cli.console import print_json, standard_output
    from skymoe.plan.train.config import PlanTrainConfig

    options = given(
        model=model, gpus=gpus, gpu=gpu, nodes_of=nodes_of, memory=memory, profile=profile, pp=pp, tp=tp, dp=dp,
        expert=expert, dispatch=dispatch, schedule=schedule, chunks=chunks, recompute=recompute,
        whole_layers=whole_layers, seq=seq, micro_batch=micro_batch, global_batch_tokens=global_batch_tokens,
        precision=precision, imbalance=imbalance, capacity=capacity, vocabulary_parallel=vocabulary_parallel, top=top,
        save=save, html=html, out=out,
    )  # fmt: skip
    config = check_config(PlanTrainConfig, options, flags=True)
    from skymoe.plan.train.files import check_files, write_files
    from skymoe.plan.train.run import run
    from skymoe.plan.train.table import show

    check_files(config)
    report = run(config)
    print_json(report.as_json()) if as_json else show(report, standard_output())
    for path in write_files(config, report):
        logger.info(f"wrote {path}")
