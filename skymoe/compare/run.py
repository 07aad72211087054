"""`skymoe merge-check`: are two model directories the same model, and if not, where and by how much?

For use after a merge, an upcycling, a quantization or a conversion. Print the report with `skymoe.compare.table.show`,
or `report.as_json()`. `skymoe ckpt diff` answers another question: whether two checkpoints are the same bits.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from skymoe.base.errors import ConfigError
from skymoe.base.progress import progress
from skymoe.compare.config import CompareConfig
from skymoe.compare.fields import compare_documents, compare_specs
from skymoe.compare.measure import compare_pair
from skymoe.compare.pairs import Pair, pair, pair_experts, with_heads
from skymoe.compare.result import SCHEMA, CompareReport, ExpertRow, FieldRow, TensorRow
from skymoe.compare.sides import Side, open_sides
from skymoe.compare.unused import find_unused, unused_fields
from skymoe.ops.distance import Distance


@torch.no_grad()
def run(config: CompareConfig) -> CompareReport:
    """Compare the models in `config.left` and `config.right`.

    Raises:
        FormatError: a directory that is missing, broken or hostile, or only one of them is a model that we know.
        ConfigError: experts were asked for and there are none to compare.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        left, right, notes = open_sides(config, stack)
        pairs = _pairs(left, right, config)
        unused = _unused(pairs, left, right, config)
        tensors, experts = _compare(pairs, unused, left, right, config)
    return CompareReport(
        schema=SCHEMA,
        left=str(config.left),
        right=str(config.right),
        left_architecture=left.spec.architecture.value if left.spec else "",
        right_architecture=right.spec.architecture.value if right.spec else "",
        raw=left.spec is None,
        tolerance=config.tolerance,
        tensors=tuple(tensors),
        experts=tuple(experts),
        fields=tuple(_fields(left, right, unused_fields(pairs, unused), config)),
        notes=notes,
        bytes_read=sum(one.num_bytes for one in pairs if one.left and one.right),
        seconds=round(time.monotonic() - started, 3),
    )


def _pairs(left: Side, right: Side, config: CompareConfig) -> list[Pair]:
    if left.spec is None or right.spec is None:
        return pair(left.names, right.names)
    names = with_heads(left.names, right.names)
    if not config.experts:
        return pair(*names)
    pairs = pair_experts(*names, left.spec)
    if not any(one.expert for one in pairs):
        what = "there are no experts to compare with a dense feed-forward"
        why = "no layer is dense in A and a mixture of experts in B"
        raise ConfigError(what, where=config.right, why=why, hint="give the dense model first, or leave --experts out")
    return pairs


def _unused(pairs: list[Pair], left: Side, right: Side, config: CompareConfig) -> frozenset[str]:
    if left.spec is None or right.spec is None:
        return frozenset()  # nobody knows what the tensors are for
    return find_unused(pairs, left.reader, right.reader, block_bytes=config.block_bytes)


def _compare(
    pairs: list[Pair], unused: frozenset[str], left: Side, right: Side, config: CompareConfig
) -> tuple[list[TensorRow], list[ExpertRow]]:
    rows = []
    experts: dict[tuple[int, int], list[tuple[TensorRow, Distance | None]]] = {}
    with progress("compare", sum(one.num_bytes for one in pairs) / 1e6, "MB") as bar:
        for one in pairs:
            row, found = compare_pair(
                one,
                left.reader,
                right.reader,
                tolerance=config.tolerance,
                block_bytes=config.block_bytes,
                unused=one.name in unused,
            )
            rows.append(row)
            if one.expert:
                experts.setdefault(one.expert, []).append((row, found))
            bar.advance(one.num_bytes / 1e6)
    found_experts = [_expert(*key, parts) for key, parts in experts.items() if all(part for _, part in parts)]
    return rows, found_experts


def _expert(layer: int, expert: int, parts: list[tuple[TensorRow, Distance | None]]) -> ExpertRow:
    whole = sum((part for _, part in parts if part), Distance())
    same = all(row.verdict == "same" for row, _ in parts)
    return ExpertRow(layer, expert, same, whole.max_abs, whole.relative_rms, whole.cosine)


def _fields(left: Side, right: Side, unused: frozenset[str], config: CompareConfig) -> list[FieldRow]:
    if left.spec is None or right.spec is None:
        return compare_documents(left.document, right.document, effect=True)
    rows = compare_specs(left.spec, right.spec, experts=config.experts, unused=unused)
    if left.spec.architecture is right.spec.architecture:
        rows += compare_documents(left.document, right.document, effect=False)
    return rows
