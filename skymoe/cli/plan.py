"""`skymoe plan`: decisions on paper. Nothing here or behind it imports torch, but for `profile`, which measures."""

from __future__ import annotations

import typer

from skymoe.cli import plan_guide, plan_pipeline, plan_profile, plan_serve, plan_train, plan_validate

app = typer.Typer(no_args_is_help=True, help="Plan a training or serving layout before a GPU hour is burned.")
app.command()(plan_profile.profile)
app.command()(plan_serve.serve)
app.command()(plan_validate.validate)
app.command()(plan_train.train)
app.command()(plan_guide.guide)
app.command()(plan_pipeline.pipeline)
