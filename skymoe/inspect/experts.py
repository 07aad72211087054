"""Router and expert statistics of a model directory, one layer at a time, in bounded memory.

The pairwise cosines come from a Gram matrix that is summed over row blocks: at no time is more than one block of a
layer's experts in memory, so that a 146B model can be inspected on a laptop (it is read once, from end to end).

Shapes: E experts, R rows of a block, C columns, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from skymoe.base.progress import progress
from skymoe.inspect.result import ExpertFigures, RouterFigures, Spread
from skymoe.ops.similarity import add_gram, cosines, similarity_matrix, summarize
from skymoe.spec.model import ModelSpec
from skymoe.weights.names import Place
from skymoe.weights.reader import WeightsReader

Key = tuple[str, int | None, tuple[int, int] | None]  # parameter, expert, rows
_MATRICES = ("gate", "up", "down")


def read_figures(
    reader: WeightsReader, spec: ModelSpec, table: Mapping[str, Place], *, chunk_bytes: int
) -> tuple[tuple[RouterFigures, ...], tuple[ExpertFigures, ...]]:
    """Figures of every MoE layer.

    Args:
        reader: the directory.
        spec: what it holds.
        table: file names to places, of the directory's own layout.
        chunk_bytes: the most bytes of expert weights in memory at a time.
    """
    names = {(place.parameter, place.expert, place.rows): name for name, place in table.items()}
    routers, experts = [], []
    with progress("reading experts", total=len(spec.moe_layer_ids), unit="layer") as bar:
        for layer in spec.moe_layer_ids:
            routers.append(_router(layer, reader.tensor(names[f"layers.{layer}.moe.router.weight", None, None])))
            experts.append(_experts(layer, reader, spec, names, chunk_bytes))
            bar.advance(similarity=experts[-1].all.mean)
    return tuple(routers), tuple(experts)


def _router(layer: int, weight_ED: Tensor) -> RouterFigures:
    norms_E = weight_ED.float().norm(dim=1)
    row_norm = Spread(float(norms_E.mean()), float(norms_E.min()), float(norms_E.max()))
    return RouterFigures(layer, row_norm, Spread(*summarize(similarity_matrix(weight_ED))))


def _experts(
    layer: int, reader: WeightsReader, spec: ModelSpec, names: Mapping[Key, str], chunk_bytes: int
) -> ExpertFigures:
    assert spec.moe is not None
    grams = {}
    for matrix in _MATRICES:
        gram_EE = torch.zeros(spec.moe.num_experts, spec.moe.num_experts, dtype=torch.float64)
        for block_ERC in _blocks(matrix, f"layers.{layer}.moe.experts", reader, spec, names, chunk_bytes):
            add_gram(gram_EE, block_ERC)
        grams[matrix] = gram_EE
    spreads = {name: Spread(*summarize(cosines(gram_EE))) for name, gram_EE in grams.items()}
    whole = Spread(*summarize(cosines(sum(grams.values(), torch.zeros_like(grams["gate"])))))
    return ExpertFigures(layer, spreads["gate"], spreads["up"], spreads["down"], whole)


def _blocks(
    matrix: str, prefix: str, reader: WeightsReader, spec: ModelSpec, names: Mapping[Key, str],
    chunk_bytes: int,
) -> Iterator[Tensor]:  # fmt: skip
    """One matrix of all experts in fp32, block of rows by block of rows, (E, R, C). A block is valid until the next."""
    assert spec.moe is not None
    size, dim, num_experts = spec.moe.ffn_size, spec.hidden_size, spec.moe.num_experts
    num_rows, num_columns = (dim, size) if matrix == "down" else (size, dim)
    parameter, rows = {
        "gate": (f"{prefix}.gate_up", (0, size)),
        "up": (f"{prefix}.gate_up", (size, 2 * size)),
        "down": (f"{prefix}.down", None),
    }[matrix]
    first = rows[0] if rows else 0
    fused = names.get((parameter, None, None))
    step = max(1, min(num_rows, chunk_bytes // (4 * num_experts * num_columns)))
    buffer_ERC = torch.empty(num_experts, step, num_columns)
    for start in range(0, num_rows, step):
        part = range(start, min(start + step, num_rows))
        block_ERC = buffer_ERC[:, : len(part)]
        for expert in range(num_experts):
            if fused is None:
                block_RC = reader.slice(names[parameter, expert, rows], part)
            else:
                shifted = range(first + part.start, first + part.stop)
                block_RC = reader.slice(fused, range(expert, expert + 1), shifted)[0]
            block_ERC[expert].copy_(block_RC)
        yield block_ERC
