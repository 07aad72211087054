"""`skymoe chat`. Imports stand inside: `--help` must not wait for torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import Extra, PlanFile, Quiet, Seed, Split, Verbose, given


def chat(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory with a tokenizer and a chat template.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest; 0 among all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest.")] = None,
    seed: Seed = None,
    tp: Annotated[int | None, typer.Option(help="Ranks to divide the model over.")] = None,
    split: Split = None,
    plan: PlanFile = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights that are not FP8, and of activations.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="The most tokens of the conversation.")] = None,
    extra: Extra = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model in the terminal. Ctrl-C stops an answer; /help lists what else can be said."""
    from skymoe.base.config import check_config
    from skymoe.chat.config import ChatConfig

    engine = given(
        model=model, tp=tp, split=split, plan=plan, dtype=dtype, device=device, max_model_len=max_model_len,
        max_batch=1, max_queue=1,
    )  # fmt: skip
    options = given(
        system=system, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    config = check_config(ChatConfig, {**options, "engine": engine}, extra or ())
    if sys.stdin.isatty():
        import readline  # noqa: F401  lines can be edited, and the last ones called back

    from skymoe.chat.run import run

    run(config)
