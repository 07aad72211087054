"""`skymoe plan`: decisions on paper. Nothing here or behind it imports torch, but for `profile`, which measures."""

from __future__ import annotations

import typer

from skymoe.cli import plan_guide, plan_pipeline, plan_profile, plan_serve, plan_train, plan_validate

app = typer.Typer(no_args_is_help=True, help="Plan a training or serving layout before a GPU hour is burned.")
for command in (
    plan_train.train,
    plan_pipeline.pipeline,
    plan_serve.serve,
    plan_guide.guide,
    plan_profile.profile,
    plan_validate.validate,
):
    app.command()(command)
