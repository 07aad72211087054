"""The small commands: data, ckpt, config, doctor. Imports stand inside: `--help` is quick."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import AsJson, Overrides, Quiet, Seed, Verbose, given

data = typer.Typer(no_args_is_help=True)
ckpt = typer.Typer(no_args_is_help=True)
config = typer.Typer(no_args_is_help=True)


@data.command("build")
def data_build(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="txt, jsonl, parquet, source files, folders.")],
    out: Annotated[Path, typer.Option(help="Directory to create.")],
    name: Annotated[str | None, typer.Option(help="Name of the data set.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace OUT when it exists.")] = None,
    format: Annotated[str | None, typer.Option(help="auto, txt, jsonl, parquet or source.")] = None,
    text_key: Annotated[str | None, typer.Option(help="The key or column that holds the text.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer; otherwise one is trained.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Size of the trained vocabulary.")] = None,
    validation_share: Annotated[float | None, typer.Option(help="Share of the documents held out.")] = None,
    seed: Seed = None,
    extra: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a tokenizer and token files from text."""
    from skymoe.base.config import read_config
    from skymoe.cli.console import print_json, print_report
    from skymoe.data.config import BuildConfig
    from skymoe.data.run import run

    options = given(
        inputs=inputs, out=out, name=name, overwrite=overwrite, format=format, text_key=text_key, tokenizer=tokenizer,
        vocab_size=vocab_size, validation_share=validation_share, seed=seed,
    )  # fmt: skip
    result = run(read_config(BuildConfig, None, extra or (), defaults=options))
    print_json(result) if as_json else print_report(result)


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
    DATA = "data"


@config.command("schema")
def config_schema(job: Annotated[Job, typer.Argument(help="Whose configuration.")] = Job.TRAIN) -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from skymoe.data.config import BuildConfig
    from skymoe.train.config import TrainConfig
    from skymoe.upcycle.config import UpcycleConfig

    configs = {Job.TRAIN: TrainConfig, Job.UPCYCLE: UpcycleConfig, Job.DATA: BuildConfig}
    print(json.dumps(configs[job].model_json_schema(), indent=2))


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine is and what torch can do on it."""
    from skymoe.cli.console import print_json, print_report
    from skymoe.cli.doctor import run

    result = run()
    print_json(result) if as_json else print_report(result)
