"""The small commands: data, ckpt, config, doctor. Imports stand inside: `--help` must not wait for torch."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from skymoe.cli.options import AsJson, Extra, Overrides, Quiet, Seed, Verbose, given

if TYPE_CHECKING:
    from skymoe.ckpt.table import Report

data = typer.Typer(no_args_is_help=True)
ckpt = typer.Typer(no_args_is_help=True)
config = typer.Typer(no_args_is_help=True)


@data.command("build")
def data_build(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="txt, jsonl, parquet, sources, folders.")],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    name: Annotated[str | None, typer.Option(help="Name of the data set.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    format: Annotated[str | None, typer.Option(help="auto, txt, jsonl, parquet or source.")] = None,
    text_key: Annotated[str | None, typer.Option(help="The key or column that holds the text.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer; otherwise one is trained.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Size of the trained vocabulary.")] = None,
    validation_share: Annotated[float | None, typer.Option(help="Share of the documents held out.")] = None,
    seed: Seed = None,
    extra: Extra = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a tokenizer and token files from text."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, print_report
    from skymoe.data.config import BuildConfig
    from skymoe.data.run import run

    options = given(
        inputs=inputs, out=out, name=name, overwrite=overwrite, format=format, text_key=text_key, tokenizer=tokenizer,
        vocab_size=vocab_size, validation_share=validation_share, seed=seed,
    )  # fmt: skip
    result = run(check_config(BuildConfig, options, extra or ()))
    print_json(result) if as_json else print_report(result)


@ckpt.command("ls")
def ckpt_ls(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or its checkpoints folder.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the checkpoint generations of a run, newest first."""
    from skymoe.base.config import check_config
    from skymoe.ckpt.config import LsConfig
    from skymoe.ckpt.run import run_ls

    _answer(run_ls(check_config(LsConfig, given(path=path))), as_json)


@ckpt.command("verify")
def ckpt_verify(
    path: Annotated[Path, typer.Argument(help="A generation, a run directory, or a model directory.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read every byte and compare it with its hash. Exit 0 intact, 1 damaged."""
    from skymoe.base.config import check_config
    from skymoe.ckpt.config import VerifyConfig
    from skymoe.ckpt.run import run_verify

    _answer(run_verify(check_config(VerifyConfig, given(path=path))), as_json)


@ckpt.command("diff")
def ckpt_diff(
    left: Annotated[Path, typer.Argument(metavar="A", help="A generation, a run directory, or a model directory.")],
    right: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare two states tensor by tensor. Exit 0 bit-equal, 1 different."""
    from skymoe.base.config import check_config
    from skymoe.ckpt.config import DiffConfig
    from skymoe.ckpt.run import run_diff

    _answer(run_diff(check_config(DiffConfig, given(left=left, right=right))), as_json)


@ckpt.command("reshard")
def ckpt_reshard(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A generation, or a run directory (its newest one).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of generations to create (RUN/checkpoints).")],
    pp: Annotated[int | None, typer.Option(help="Pipeline ranks.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    expert: Annotated[str | None, typer.Option(help="Experts over tp (edp), dp x tp (ep), dp and cut (etp).")] = None,
    schedule: Annotated[str | None, typer.Option(help="1f1b, interleaved or zbv.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank under interleaved.")] = None,
    split: Annotated[str | None, typer.Option(help="Layers per stage: 4,4.5,3.5")] = None,
    zero_shards: Annotated[
        bool | None, typer.Option("--zero-shards/--no-zero-shards", help="Divide what dp ranks have alike (default).")
    ] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint generation again in the slices of another layout."""
    from skymoe.base.config import check_config
    from skymoe.ckpt.config import ReshardConfig
    from skymoe.ckpt.reshard import run_reshard

    options = given(
        source=source, out=out, pp=pp, tp=tp, dp=dp, expert=expert, schedule=schedule, chunks=chunks,
        split=None if split is None else split.split(","), zero_shards=zero_shards, overwrite=overwrite,
    )  # fmt: skip
    _answer(run_reshard(check_config(ReshardConfig, options)), as_json)


@ckpt.command("export")
def ckpt_export(
    source: Annotated[
        Path, typer.Argument(metavar="GENERATION", help="A generation, or a run directory (its newest intact one).")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model directory to create.")],
    dtype: Annotated[str | None, typer.Option(help="Of the weights; otherwise that of the run.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Copy this directory's tokenizer.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a Hugging Face model directory of a checkpoint generation, whatever layout wrote it."""
    from skymoe.base.config import check_config
    from skymoe.ckpt.config import ExportConfig
    from skymoe.ckpt.export import run_export

    options = given(source=source, out=out, dtype=dtype, tokenizer=tokenizer, overwrite=overwrite)
    _answer(run_export(check_config(ExportConfig, options)), as_json)


def _answer(report: Report, as_json: bool) -> NoReturn:
    from skymoe.ckpt.table import show
    from skymoe.cli.console import print_json

    print_json(report.as_json()) if as_json else show(report)
    raise typer.Exit(report.exit_code)


@config.command("show")
def config_show(
    recipe: Annotated[Path, typer.Argument(help="A training recipe, YAML or TOML.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print a training recipe in full: its base, the environment, the overrides and all defaults."""
    from skymoe.base.config import dump_config, read_config
    from skymoe.cli.console import print_json
    from skymoe.train.config import TrainConfig

    resolved = read_config(TrainConfig, recipe, overrides or ())
    print_json(resolved) if as_json else print(dump_config(resolved), end="")


class Job(StrEnum):
    """Whose configuration."""

    TRAIN = "train"
    UPCYCLE = "upcycle"
    EXPORT = "export"
    QUANTIZE = "quantize"
    MERGE_CHECK = "merge-check"
    DATA = "data"


@config.command("schema")
def config_schema(job: Annotated[Job, typer.Argument(help="Whose configuration.")] = Job.TRAIN) -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from skymoe.base.config import Config
    from skymoe.compare.config import CompareConfig
    from skymoe.data.config import BuildConfig
    from skymoe.export.config import ExportConfig
    from skymoe.quantize.config import QuantizeConfig
    from skymoe.train.config import TrainConfig
    from skymoe.upcycle.config import UpcycleConfig

    configs: dict[Job, type[Config]] = {
        Job.TRAIN: TrainConfig,
        Job.UPCYCLE: UpcycleConfig,
        Job.EXPORT: ExportConfig,
        Job.QUANTIZE: QuantizeConfig,
        Job.MERGE_CHECK: CompareConfig,
        Job.DATA: BuildConfig,
    }
    print(json.dumps(configs[job].model_json_schema(), indent=2))


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine is and what torch can do on it."""
    from skymoe.cli.console import print_json, print_report
    from skymoe.cli.doctor import run

    result = run()
    print_json(result) if as_json else print_report(result)
