"""`skymoe serve`. Imports stand inside: `--help` must not wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skymoe.cli.options import Extra, Quiet, Verbose, given


def serve(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face directory with tokenizer.json.")],
    host: Annotated[str | None, typer.Option(help="Where to listen; default: 127.0.0.1. Others need a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000; 0 takes a free one.")] = None,
    tp: Annotated[
        int | None, typer.Option("--tp", help="Ranks to divide the model over, as evenly as possible.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(metavar="UNIT=A,B", help="heads=5,5,4, ffn=, experts=, or weights=3,1 (shares).")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A serving plan of `skymoe plan serve --save`.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights that are not FP8: float32, bfloat16.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of keys and values: auto, fp32, bf16, fp8.")] = None,
    kv_memory: Annotated[float | None, typer.Option(metavar="GB", help="Keys and values per rank, 10^9 bytes.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="The most tokens of a request, prompt and answer.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="The most requests in a step.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="The most requests that wait; more are told 429.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; default: its directory's.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Its first line is the key; or $SKYMOE_API_KEY.")] = None,
    insecure_no_auth: Annotated[
        bool | None, typer.Option("--insecure-no-auth", help="Listen beyond this machine without a key.")
    ] = None,
    drain: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="To finish after SIGTERM; default: 30.")
    ] = None,
    extra: Extra = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model with OpenAI's HTTP interface, and a page to chat with it."""
    from skymoe.base.config import check_config
    from skymoe.serve.config import ServeConfig

    engine = given(
        model=model, tp=tp, split=split, plan=plan, dtype=dtype, kv_dtype=kv_dtype, kv_memory_gb=kv_memory,
        max_model_len=max_model_len, max_batch=max_batch, device=device,
    )  # fmt: skip
    options = given(
        engine=engine, host=host, port=port, name=name, api_key_file=api_key_file, insecure_no_auth=insecure_no_auth,
        drain_s=drain, limits=given(waiting=max_waiting),
    )  # fmt: skip
    config = check_config(ServeConfig, options, extra or ())
    from skymoe.serve.run import run

    raise typer.Exit(run(config))
