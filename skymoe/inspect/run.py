"""`skymoe inspect`: what a model is and what it costs, from a directory or a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from skymoe.inspect.config import InspectConfig
from skymoe.inspect.facts import flops_table, parameters_by_part, shape, sizes
from skymoe.inspect.result import SCHEMA, InspectReport
from skymoe.spec.flops import count_parameters
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import ModelSpec
from skymoe.spec.named import preset_or_directory
from skymoe.weights.index import ModelFiles
from skymoe.weights.match import match_tensors
from skymoe.weights.names import Place
from skymoe.weights.scales import list_tensors


def run(config: InspectConfig) -> InspectReport:
    """Describe `config.model`; print it with `skymoe.inspect.table.show`, or `report.as_json()`.

    A preset's name wins over a directory of the same name, which can be given as `./name`.

    Raises:
        FormatError: neither a preset nor a readable model directory.
    """
    directory = preset_or_directory(config.model)
    if not isinstance(directory, Path):
        return _describe(config, directory, None)
    spec = spec_from_directory(directory)
    with ModelFiles(directory) as files:
        match = match_tensors(spec, list_tensors(directory, files.tensors).tensors, where=directory)
        report = _describe(config, spec, files)
    if not (config.weights and spec.moe_layer_ids):
        return report
    return _with_weights(report, config, spec, match.table)


def _describe(config: InspectConfig, spec: ModelSpec, files: ModelFiles | None) -> InspectReport:
    count = count_parameters(spec)
    return InspectReport(
        schema=SCHEMA,
        model=config.model,
        source="preset" if files is None else "directory",
        architecture=spec.architecture.value,
        parameters=count.total,
        active_parameters=count.active,
        parameters_by_part=parameters_by_part(spec),
        shape=shape(spec),
        flops_per_token=flops_table(spec, config.sequence_length or spec.max_position),
        bytes=sizes(spec, files),
    )


def _with_weights(
    report: InspectReport, config: InspectConfig, spec: ModelSpec, table: Mapping[str, Place]
) -> InspectReport:
    # Here, not above: torch takes seconds to import, and only the weights of a mixture of experts need it.
    from skymoe.inspect.experts import read_figures
    from skymoe.weights.decoded import DecodedReader

    with DecodedReader(config.model) as reader:
        routers, experts = read_figures(reader, spec, table, chunk_bytes=config.chunk_bytes)
    similarity = fmean(layer.all.mean for layer in experts)
    return replace(report, routers=routers, experts=experts, expert_similarity=similarity)
