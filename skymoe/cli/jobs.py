"""The commands on models, as a newcomer meets them. Imports stand inside: `--help` must not wait for torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from skymoe.cli.options import AsJson, Overrides, PlanFile, Quiet, Seed, Split, Verbose, given

if TYPE_CHECKING:
    from skymoe.generate.config import GenerateConfig


def demo(
    out: Annotated[Path | None, typer.Option(help="Directory for everything the demo makes; default: demo.")] = None,
    seed: Seed = None,
    quick: Annotated[bool | None, typer.Option("--quick", help="Fewer steps: the way, not the result.")] = None,
    corpus: Annotated[str | None, typer.Option(help="stdlib: Python's own text; synthetic: made up.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """See it all in three minutes: text, a dense model, its mixture of experts, both trained on, a report."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, standard_output
    from skymoe.demo.config import DemoConfig

    config = check_config(DemoConfig, given(out=out, seed=seed, quick=quick, corpus=corpus))
    from skymoe.demo.run import run
    from skymoe.demo.table import show

    result = run(config)
    print_json(result.summary) if as_json else show(result, standard_output())
    raise typer.Exit(result.exit_code)


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML or TOML file.")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="Processes to start on this machine; see docs/cluster.md.", min=1)] = 1,
    max_restarts: Annotated[int, typer.Option(help="How often to start all again when one dies.", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print it in full.")] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: what one rank of so many would be, built without memory.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="With --world-size: which rank; default: 0.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train by a recipe. The same command again resumes; Ctrl-C saves first."""
    from skymoe.base.config import dump_config, read_config
    from skymoe.base.log import setup_logging
    from skymoe.cli.console import print_json, print_report
    from skymoe.parallel.lifeline import die_with_launcher, is_first_rank
    from skymoe.train.config import TrainConfig

    die_with_launcher()
    if not is_first_rank():
        setup_logging(-1)  # one voice: the others speak when something is wrong
    config = read_config(TrainConfig, recipe, overrides or ())
    _check_dry_run(dry_run, world_size, rank)
    if dry_run and world_size is not None:
        from skymoe.cli.console import standard_output
        from skymoe.train.dry_run import dry_run as build_rank
        from skymoe.train.dry_run_table import show

        report = build_rank(config, world_size=world_size, rank=rank or 0)
        print_json(report) if as_json else show(report, standard_output())
        return
    if dry_run:
        print_json(config) if as_json else print(dump_config(config), end="")
        return
    if nproc > 1 or max_restarts:
        from skymoe.parallel.launcher import launch, worker_command

        flags = [flag for flag, given in (("--json", as_json), ("-q", quiet), ("-v", verbose)) if given]
        raise typer.Exit(
            launch(worker_command("train", recipe, *overrides or (), *flags), nproc, max_restarts=max_restarts)
        )
    from skymoe.train.run import run

    result = run(config)
    if is_first_rank():
        print_json(result) if as_json else print_report(result)
    raise typer.Exit(result.exit_code)


def _check_dry_run(dry_run: bool, world_size: int | None, rank: int | None) -> None:
    from skymoe.base.errors import ConfigError

    if world_size is not None and not dry_run:
        raise ConfigError("--world-size belongs to --dry-run", hint="--nproc starts processes, and so does torchrun")
    if rank is not None and world_size is None:
        raise ConfigError("--rank is one of how many?", hint=f"--dry-run --world-size N --rank {rank}")


def generate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory with tokenizer.json.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text to continue; - reads standard input.")
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Many prompts: JSON Lines; see docs/generate_batch.md. Needs --output.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the answers go. The same command goes on where it was stopped.")
    ] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Begin the output anew.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens to write.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest; 0 among all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest that sum to p.")] = None,
    seed: Seed = None,
    ignore_eos: Annotated[bool | None, typer.Option("--ignore-eos", help="Go on after the end of the text.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Load the weights in this format.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device: cpu, cuda:0; with --input: cpu, cuda.")] = None,
    tp: Annotated[int | None, typer.Option(help="With --input: ranks to divide the model over.")] = None,
    split: Split = None,
    plan: PlanFile = None,
    extra: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --input: any key, as engine.max_batch.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text, token by token; or many of them, from a file into a file."""
    from skymoe.base.config import check_config
    from skymoe.base.errors import ConfigError

    options = given(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, ignore_eos=ignore_eos, dtype=dtype, device=device,
    )  # fmt: skip
    many = given(input=input, output=output, overwrite=overwrite, tp=tp, split=split, plan=plan, extra=extra)
    if input is not None:
        if prompt is not None:
            raise ConfigError("either a text or --input, not both")
        _generate_many(options, many, as_json=as_json)
    if many:
        raise ConfigError(f"--{'set' if 'extra' in many else next(iter(many))} belongs to --input")
    if prompt is None:
        raise ConfigError("what is to be continued?", hint='skymoe generate DIR "Once upon a time", or --input FILE')
    from skymoe.generate.config import GenerateConfig

    _generate_one(check_config(GenerateConfig, options), as_json=as_json)


def _generate_one(config: GenerateConfig, *, as_json: bool) -> None:
    from skymoe.base.log import logger
    from skymoe.cli.console import print_json
    from skymoe.data.text_stream import for_terminal
    from skymoe.generate.run import run

    if as_json:
        print_json(run(config))
        return
    shown = for_terminal if sys.stdout.isatty() else str
    result = run(config, write=lambda text: print(shown(text), end="", flush=True))
    print()
    sys.stdout.flush()
    logger.info(f"{len(result.token_ids)} tokens, {result.tokens_per_s:.1f} tokens/s, seed {result.seed}")


def _generate_many(options: dict[str, object], many: dict[str, object], *, as_json: bool) -> NoReturn:
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, print_report
    from skymoe.generate.config import BatchConfig

    taken = {**options, **many}
    extra = taken.pop("extra", ())
    engine = {name: taken.pop(name) for name in ("model", "dtype", "device", "tp", "split", "plan") if name in taken}
    config = check_config(BatchConfig, {**taken, "engine": engine}, extra)  # type: ignore[arg-type]
    from skymoe.generate.batch import run

    result = run(config)
    print_json(result) if as_json else print_report(result)
    raise typer.Exit(result.exit_code)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, or a preset such as skywork-moe.")],
    sequence_length: Annotated[int | None, typer.Option(help="Context for the FLOP count.")] = None,
    headers_only: Annotated[bool, typer.Option("--headers-only", help="Do not read the weights.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model is and costs: parameters, FLOPs, bytes, routers, expert similarity."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json
    from skymoe.inspect.config import InspectConfig

    options = given(model=model, sequence_length=sequence_length, weights=False if headers_only else None)
    config = check_config(InspectConfig, options)
    from skymoe.inspect.run import run
    from skymoe.inspect.table import show

    result = run(config)
    print_json(result.as_json()) if as_json else show(result)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or the directory of a demo.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw one self-contained HTML page from one or several runs."""
    from skymoe.base.config import check_config
    from skymoe.cli.console import print_json, print_report
    from skymoe.report.config import ReportConfig
    from skymoe.report.run import run

    result = run(check_config(ReportConfig, given(runs=runs, out=out, title=title)))
    print_json(result) if as_json else print_report(result)
