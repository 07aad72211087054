"""Everything of a model directory besides the weights, for every command that makes a model from a model.

Two halves, because the receipt lies between them: `write_documents` makes the directory one that can be loaded
(config, generation config, tokenizer, chat templates, licences, modelling files); then the receipt is measured; then
`write_record` writes down what was done (skymoe.json, receipt.json, README.md). Same inputs, same bytes: no clock, no
host name, no absolute path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skymoe.base.dtype import DType
from skymoe.base.files import write_atomic
from skymoe.convert.card import model_card
from skymoe.convert.made import Made, provenance
from skymoe.convert.measured import RECEIPT_NAME, Receipt
from skymoe.model.save import write_config_files, write_json
from skymoe.spec.model import ModelSpec
from skymoe.weights.companions import PROVENANCE_NAME, licence_names, read_companion, write_companions

CARD_NAME = "README.md"


def write_documents(
    directory: Path,
    target: ModelSpec,
    dtype: DType,
    parents: Sequence[Path],
    *,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Make `directory` a model directory, but for the weights.

    Args:
        directory: exists.
        target: what the model is.
        dtype: of most of its weights.
        parents: directories of the parents, the base first: its tokenizer, chat templates and generation config are
            copied byte for byte, and the licences of all.
        extra_config: more entries of config.json, such as `quantization_config`.

    Raises:
        FormatError: a parent's file is hostile. ConfigError: the architecture cannot carry `target`.
        MachineError: no space, no permission.
    """
    write_config_files(directory, target, dtype, source=parents[0], extra_config=extra_config)
    write_companions(directory, licences(parents))


def licences(parents: Sequence[Path]) -> dict[str, bytes]:
    """File name to content of the parents' licences; a second one of a name is called after its parent's number."""
    kept: dict[str, bytes] = {}
    for number, parent in enumerate(parents, 1):
        for name in licence_names(parent):
            content = read_companion(parent, name)
            if content not in (kept.get(name), *[kept[other] for other in kept if other.startswith(f"{name}.parent")]):
                kept[name if name not in kept else f"{name}.parent{number}"] = content
    return kept


def write_record(directory: Path, target: ModelSpec, made: Made, receipt: Receipt | None) -> None:
    """Write skymoe.json, receipt.json (where there is a receipt) and the model card. Raises MachineError."""
    write_json(directory / PROVENANCE_NAME, provenance(made))
    if receipt is not None:
        write_json(directory / RECEIPT_NAME, receipt.as_json())
    card = model_card(target, made, receipt, licence_files=licence_names(directory))
    write_atomic(directory / CARD_NAME, card.encode())
