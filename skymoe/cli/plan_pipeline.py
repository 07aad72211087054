"""`skymoe plan pipeline`. Imports stand inside: `--help` must not wait for what a command needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Extra, Quiet, Verbose, given


def pipeline(
    forward: Annotated[str, typer.Option(help="Forward time of each unit: 1,1,2 or 1x24.")],
    backward: Annotated[str, typer.Option(help="Backward times; one value is for all units, as in all lists.")],
    stages: Annotated[int, typer.Option(help="Ranks of the pipeline.")],
    microbatches: Annotated[int, typer.Option(help="Micro-batches of a step.")],
    weight: Annotated[str | None, typer.Option(help="The part of backward that is gradients of weights.")] = None,
    again: Annotated[str | None, typer.Option(help="Time of running again; default: the forward.")] = None,
    static: Annotated[str | None, typer.Option(help="Memory for good.")] = None,
    activation: Annotated[str | None, typer.Option(help="Memory per micro-batch alive.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Memory per micro-batch of a layer run again.")] = None,
    transient: Annotated[str | None, typer.Option(help="Memory while a unit runs.")] = None,
    halves: Annotated[bool, typer.Option("--halves", help="Two units are a layer: attention, feed-forward.")] = False,
    whole_layers: Annotated[bool | None, typer.Option("--whole-layers", help="Cut between layers only.")] = None,
    embedding_forward: Annotated[float | None, typer.Option(help="Time on the first stage.")] = None,
    embedding_backward: Annotated[float | None, typer.Option(help="Time on the first stage.")] = None,
    embedding_static: Annotated[float | None, typer.Option(help="Memory on the first stage for good.")] = None,
    head_forward: Annotated[float | None, typer.Option(help="Time on the last stage.")] = None,
    head_backward: Annotated[float | None, typer.Option(help="Time on the last stage.")] = None,
    head_static: Annotated[float | None, typer.Option(help="Memory on the last stage for good.")] = None,
    head_activation: Annotated[float | None, typer.Option(help="Memory on the last stage per micro-batch.")] = None,
    head_transient: Annotated[float | None, typer.Option(help="Memory on the last stage: logits.")] = None,
    memory: Annotated[float | None, typer.Option(help="Of a rank; default: no limit.")] = None,
    hop: Annotated[float | None, typer.Option(help="Time from rank to rank.")] = None,
    schedule: Annotated[str | None, typer.Option(help="1f1b, interleaved or zbv.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank under interleaved.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Whether layers may be run again (default).")
    ] = None,
    vocabulary_parallel: Annotated[
        bool | None, typer.Option("--vocabulary-parallel", help="Divide embedding and head over all ranks.")
    ] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draw both timelines in the terminal.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw both timelines into this file.")] = None,
    extra: Extra = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Divide a pipeline in abstract units, with a proof: which stage takes what, and what it runs again."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, standard_output
    from skymoe.plan.pipeline.config import PipelineConfig, read_amounts

    lists = given(
        forward=forward, backward=backward, weight=weight, again=again, static=static, activation=activation,
        checkpoint=checkpoint, transient=transient,
    )  # fmt: skip
    options = given(
        units_per_layer=2 if halves else None, whole_layers=whole_layers, stages=stages, microbatches=microbatches,
        embedding_forward=embedding_forward, embedding_backward=embedding_backward, embedding_static=embedding_static,
        head_forward=head_forward, head_backward=head_backward, head_static=head_static,
        head_activation=head_activation, head_transient=head_transient, memory=memory, hop=hop, schedule=schedule,
        chunks=chunks, recompute=recompute, vocabulary_parallel=vocabulary_parallel,
    )  # fmt: skip
    options |= {name: read_amounts(str(text), f"--{name}") for name, text in lists.items()}
    config = check_config(PipelineConfig, options, extra or (), flags={"units_per_layer": "--halves"})
    from skymoe.base.files import refuse_no_file, write_atomic
    from skymoe.plan.pipeline.run import run
    from skymoe.plan.pipeline.table import show

    if svg is not None:
        refuse_no_file(svg)
    report = run(config)
    if svg is not None:
        from skymoe.plan.pipeline.drawn import report_svg

        write_atomic(svg, report_svg(report).encode())
    if as_json:
        print_json(report.as_json())
        return
    console = standard_output()
    show(report, console)
    if draw:
        from skymoe.plan.draw.terminal import show_timelines
        from skymoe.plan.pipeline.drawn import panels_of

        answers = {"uniform": report.uniform.answer, "planned": report.planned.answer}
        show_timelines(panels_of(report.problem, answers), console)
