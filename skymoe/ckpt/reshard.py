"""`skymoe ckpt reshard`: a generation in the slices of another layout, offline, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path

from skymoe.base.errors import CheckpointError
from skymoe.base.files import refuse_existing, refuse_source, staging_directory
from skymoe.ckpt.config import ReshardConfig
from skymoe.ckpt.places import find_newest
from skymoe.ckpt.result import ReshardReport
from skymoe.parallel.config import ParallelConfig, layout_of
from skymoe.spec.layout import Layout
from skymoe.spec.model import ModelSpec
from skymoe.spec.plain import spec_from_plain
from skymoe.weights.listing import Listed
from skymoe.weights.manifest import read_manifest
from skymoe.weights.rewrite import rewrite_generation
from skymoe.weights.verify import verify_listed

STATE = "state.json"


def run_reshard(config: ReshardConfig) -> ReshardReport:
    """Verify the source, and write it again.

    Raises:
        CheckpointError: no generation, a damaged one, or one without a model.
        ConfigError: the model cannot be divided so; `out` exists.
        MachineError: no space, no permission. Nothing is left behind.
    """
    refuse_existing(config.out, config.overwrite)
    one = find_newest(config.source)
    refuse_source(config.out, one.path)
    if problems := verify_listed(one):
        raise CheckpointError(f"the checkpoint is damaged: {problems[0]}", where=one.path)
    assert one.manifest is not None
    spec = read_spec(one)
    layout = _layout(config, spec)
    with staging_directory(config.out, overwrite=config.overwrite) as staging:
        written = rewrite_generation(one.path, one.manifest, staging, spec, layout, zero_shards=config.zero_shards)
        manifest, _ = read_manifest(written)
    return ReshardReport(
        source=str(one.path),
        out=str(config.out / written.name),
        step=one.step,
        layout=manifest.layout,
        num_files=len(manifest.files),
        num_bytes=manifest.num_bytes,
        num_tensors=manifest.num_tensors,
    )


def read_spec(one: Listed) -> ModelSpec:
    """The model whose state a generation is. Raises CheckpointError when it does not say."""
    path = one.path / STATE
    document = json.loads(_read(path))
    if not isinstance(document, dict) or "model" not in document:
        raise CheckpointError("does not say which model it is of", where=path, hint="a generation of `skymoe train`")
    return spec_from_plain(document["model"], where=path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error


def _layout(config: ReshardConfig, spec: ModelSpec) -> Layout:
    asked = ParallelConfig(
        pp=config.pp, tp=config.tp, dp=config.dp, expert=config.expert, schedule=config.schedule, chunks=config.chunks,
        split=config.split,
    )  # fmt: skip
    return layout_of(asked, spec, world_size=config.pp * config.dp * config.tp)
