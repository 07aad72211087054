"""`skymoe ckpt export`: a Hugging Face directory of any generation.

The one file of this room that needs torch: weights are cast and written as every other command that makes a model does
it, by `model.export`; a second writer without torch would be a second truth. It is imported late, so that `ls` and the
others stay as quick as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skymoe.base.errors import CheckpointError
from skymoe.base.files import refuse_existing
from skymoe.ckpt.config import ExportConfig
from skymoe.ckpt.places import find_root, is_generation
from skymoe.ckpt.result import ExportReport
from skymoe.model.export import export_generation
from skymoe.weights.companions import tokenizer_names
from skymoe.weights.generation import Generation, latest_generation, load_generation


def run_export(config: ExportConfig) -> ExportReport:
    """Verify the generation and write its model.

    Raises:
        CheckpointError: no generation that is intact, or one that is not of a model.
        ConfigError: `out` exists. FormatError: the tokenizer is hostile.
        MachineError: no space, no permission. Nothing is left behind.
    """
    refuse_existing(config.out, config.overwrite)
    generation = _find(config.source)
    notes = [f"{name} was passed over: {reason}" for name, reason in generation.skipped]
    tokenizer = config.tokenizer or _tokenizer(generation.document("state"))
    if tokenizer is None or not tokenizer_names(tokenizer):
        notes.append(f"no tokenizer was copied: {tokenizer or 'the recipe'} has none")
    provenance = {"checkpoint": {"step": generation.step, "run": generation.manifest.run}}
    out = export_generation(
        generation,
        config.out,
        dtype=config.dtype.value if config.dtype else None,
        tokenizer_from=tokenizer,
        provenance=provenance,
        overwrite=config.overwrite,
    )
    written = json.loads((out / "config.json").read_text())
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return ExportReport(
        source=str(generation.path),
        out=str(out),
        step=generation.step,
        architecture=written["model_type"],
        dtype=str(written.get("dtype", written.get("torch_dtype", ""))),
        files=tuple(path.relative_to(out).as_posix() for path in files),
        num_bytes=sum(path.stat().st_size for path in files),
        notes=tuple(notes),
    )


def _find(path: Path) -> Generation:
    if is_generation(path):
        return load_generation(path)
    root = find_root(path)
    generation = latest_generation(root)
    if generation is None:
        raise CheckpointError("no checkpoints here", where=root)
    return generation


def _tokenizer(state: Any) -> Path | None:
    """The directory that the run's recipe names, if it is still there: its tokenizer, or the model it began with."""
    recipe = state.get("recipe", {}) if isinstance(state, dict) else {}
    named = [recipe.get("data", {}).get("tokenizer"), recipe.get("model", {}).get("path")]
    return next((Path(one) for one in named if one and Path(one).is_dir()), None)
