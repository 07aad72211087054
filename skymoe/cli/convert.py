"""The commands that turn one model directory into another. Imports stand inside: `--help` must not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from skymoe.cli.options import AsJson, Extra, Quiet, Seed, Verbose, given


def upcycle(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="SRC... OUT", help="The model (or several), and the directory to create."),
    ],
    method: Annotated[
        str | None, typer.Option(help="copy, drop, noise, virtual_group, specialists, partition or duplicate.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts per layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token.")] = None,
    granularity: Annotated[int | None, typer.Option(help="virtual_group: shards per feed-forward.")] = None,
    expansion: Annotated[int | None, typer.Option(help="virtual_group: experts of each shard.")] = None,
    ratio: Annotated[float | None, typer.Option(help="drop: share of the neurons that are drawn anew.")] = None,
    gate_norm: Annotated[bool | None, typer.Option(help="Gating logit normalization (Skywork-MoE Eq. 6).")] = None,
    preset: Annotated[str | None, typer.Option(help="skywork or portable; what is given beside it wins.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the new weights; that of SRC if not given.")] = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Print every tensor; write nothing.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    seed: Seed = None,
    extra: Extra = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn a dense model into a mixture of experts, or a mixture into a larger one, with a receipt of how exactly it
    computes the same.
    """
    from skymoe.base.config import check_config
    from skymoe.base.errors import ConfigError
    from skymoe.upcycle.config import UpcycleConfig

    *sources, out = paths
    if not sources:
        raise ConfigError("the directory to create is missing", hint="skymoe upcycle SRC OUT")
    options = given(
        sources=[str(source) for source in sources], out=out, method=method, experts=experts, top_k=top_k,
        granularity=granularity, expansion=expansion, ratio=ratio, gate_norm=gate_norm, preset=preset, dtype=dtype,
        dry_run=dry_run, overwrite=overwrite, seed=seed,
    )  # fmt: skip
    config = check_config(UpcycleConfig, options, extra or ())
    from skymoe.upcycle.run import dry_run as plan
    from skymoe.upcycle.run import run
    from skymoe.upcycle.table import show, show_plan

    _answer(config, as_json, plan=plan, run=run, show=show, show_plan=show_plan)


def export(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A model, a Hugging Face directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.")],
    format: Annotated[
        str | None, typer.Option(help="mixtral, qwen2_moe, qwen3_moe, olmoe, skymoe or skywork.", show_default=False)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the new weights; that of SRC if not given.")] = None,
    fold_gate_norm: Annotated[
        bool | None, typer.Option("--fold-gate-norm", help="Approximate: one temperature per layer, fitted on --text.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text like what the model will read, for the fold.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Refuse a fold that changes the model more than this.")] = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Print every tensor; write nothing.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    seed: Seed = None,
    extra: Extra = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a model in the format that another tool reads, exactly or not at all, with a receipt."""
    from skymoe.base.config import check_config
    from skymoe.export.config import ExportConfig

    options = given(
        source=source, out=out, format=format, dtype=dtype, fold_gate_norm=fold_gate_norm, text=text, max_kl=max_kl,
        dry_run=dry_run, overwrite=overwrite, seed=seed,
    )  # fmt: skip
    config = check_config(ExportConfig, options, extra or ())
    from skymoe.export.run import dry_run as plan
    from skymoe.export.run import run
    from skymoe.export.table import show, show_plan

    _answer(config, as_json, plan=plan, run=run, show=show, show_plan=show_plan)


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model directory; with --dry-run also a preset.")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Directory to create.")] = None,
    scheme: Annotated[str | None, typer.Option(help="block, channel or tensor: which weights share a scale.")] = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Print every tensor; write nothing.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    seed: Seed = None,
    extra: Extra = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Round a model's matrices to FP8 (e4m3), with an audit of what that changed."""
    from skymoe.base.config import check_config
    from skymoe.quantize.config import QuantizeConfig

    options = given(source=source, out=out, scheme=scheme, dry_run=dry_run, overwrite=overwrite, seed=seed)
    config = check_config(QuantizeConfig, options, extra or ())
    from skymoe.quantize.run import dry_run as plan
    from skymoe.quantize.run import run
    from skymoe.quantize.table import show, show_plan

    _answer(config, as_json, plan=plan, run=run, show=show, show_plan=show_plan)


def merge_check(
    left: Annotated[Path, typer.Argument(metavar="A", help="A model, a Hugging Face directory.")],
    right: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Largest |A-B| of a tensor that is equal, as a part of its largest |A|.")
    ] = None,
    experts: Annotated[
        bool | None, typer.Option("--experts", help="Compare B's experts with A's dense feed-forward.")
    ] = None,
    raw: Annotated[bool | None, typer.Option("--raw", help="Pair tensors by their names in the files.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare two models tensor by tensor, whatever their layouts. Exit 0 equal, 1 different."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, standard_output
    from skymoe.compare.config import CompareConfig

    options = given(left=left, right=right, tolerance=tolerance, experts=experts, raw=raw)
    config = check_config(CompareConfig, options)
    from skymoe.compare.run import run
    from skymoe.compare.table import show

    result = run(config)
    print_json(result.as_json()) if as_json else show(result, standard_output())
    raise typer.Exit(result.exit_code)


def _answer(
    config: Any,
    as_json: bool,
    *,
    plan: Callable[[Any], Any],
    run: Callable[[Any], Any],
    show: Callable[..., None],
    show_plan: Callable[..., None],
) -> None:
    """Do it, or with `dry_run` say what would be done; print the one report or the other."""
    from skymoe.cli.console import print_json, standard_output

    if config.dry_run:
        planned = plan(config)
        print_json(planned.as_json()) if as_json else show_plan(planned, standard_output())
        return
    result = run(config)
    print_json(result) if as_json else show(result, standard_output())
