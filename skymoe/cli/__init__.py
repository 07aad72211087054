"""Floor 7: the command line. One table of commands, imports late.

A command reads its options into the job's Config, calls the job's `run`, and prints the report: as text, or with
`--json` as data on standard output. Everything else (progress, log, errors) goes to standard error. Exit codes are
those of `skymoe.base.errors`. `convert.py` has the commands that write a model from a model or hold two against each
other, `jobs.py` the other work on models, `tools.py` the small ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from skymoe import __version__
from skymoe.base.errors import SkymoeError
from skymoe.base.files import machine_errors
from skymoe.base.log import setup_logging
from skymoe.cli import chat, convert, jobs, plan, serving, tools

_DEFECT = 70  # sysexits.h EX_SOFTWARE: ours, not the user's

app = typer.Typer(name="skymoe", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"skymoe {__version__}")
        raise typer.Exit


@app.callback()
def skymoe(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version)] = False,
) -> None:
    """Grow a dense language model into a mixture of experts, train it, measure it."""


for command in (
    jobs.demo,
    convert.upcycle,
    convert.export,
    convert.quantize,
    convert.merge_check,
    jobs.train,
    jobs.generate,
    chat.chat,
    jobs.inspect,
    jobs.report,
    serving.serve,
):
    app.command()(command)
app.add_typer(plan.app, name="plan", help="Plan layouts for training and serving, on paper.")
app.add_typer(tools.data, name="data", help="Make token files from text.")
app.add_typer(tools.ckpt, name="ckpt", help="List, verify and compare checkpoints.")
app.add_typer(tools.config, name="config", help="Show what a recipe means and what may stand in it.")
app.command()(tools.doctor)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave the process with its exit code."""
    setup_logging()
    # Before torch is loaded: threads that spin while they wait lose most of their speed to any other busy process.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        with machine_errors("this machine", paths=False):
            app(args=arguments, prog_name="skymoe")
        raise AssertionError("typer leaves by SystemExit")
    except SkymoeError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        print("This is a defect of skymoe. Please report it with the output of `skymoe doctor`.", file=sys.stderr)
        code = _DEFECT
    sys.exit(_flush(code))


def _flush(code: int) -> int:
    """Push out what is printed. A reader that has gone away (`skymoe ... | head`) is no error of ours."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while it shuts down
    return code
