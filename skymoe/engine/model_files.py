"""Parts of a model's parameters, out of its directory: rows and columns of matrices, FP8 as codes and scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.inside import read_inside
from skymoe.base.strict_json import parse_json
from skymoe.engine.weights import Fp8, Plain
from skymoe.ops.fp8_matmul import checked_codes
from skymoe.spec.model import ModelSpec
from skymoe.spec.quantization import Fp8Scheme
from skymoe.weights.companions import GENERATION_NAME
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.match import Match

_MAX_BYTES = 1 << 20


def end_tokens(directory: Path, spec: ModelSpec) -> tuple[int, ...]:
    """End-of-text tokens: those of config.json, and those that chat models add in generation_config.json.

    Raises:
        FormatError: that file is no JSON, or a link that leads out of the directory.
    """
    data = read_inside(directory, GENERATION_NAME, max_bytes=_MAX_BYTES)
    found = {} if data is None else parse_json(data, where=directory / GENERATION_NAME)
    named = found.get("eos_token_id") if isinstance(found, dict) else None
    more = [token for token in (named if isinstance(named, list) else [named]) if type(token) is int]
    return tuple(dict.fromkeys((*spec.eos_ids, *(token for token in more if 0 <= token < spec.vocab_size))))


class ModelFiles:
    """Parts of a model's parameters, wherever and however they lie in the files.

    Args:
        reader: of the directory.
        match: its tensors, held against the spec.
        dtype, device: of what is read and is not FP8.
    """

    def __init__(self, reader: DecodedReader, match: Match, dtype: torch.dtype, device: torch.device) -> None:
        self.reader, self.dtype, self.device = reader, dtype, device
        self._names = {
            (place.parameter, place.expert, place.rows[0] if place.rows else 0): (name, place.shape)
            for name, place in match.table.items()
        }

    def tensor(self, parameter: str, *parts: range, dtype: torch.dtype | None = None) -> Tensor:
        """A part of a parameter, decoded."""
        name, _ = self._names[parameter, None, 0]
        return self.reader.slice(name, *parts).to(self.device, dtype or self.dtype)

    def optional(self, parameter: str, *parts: range) -> Tensor | None:
        """The same; None where the model has no such parameter."""
        return self.tensor(parameter, *parts) if (parameter, None, 0) in self._names else None

    def matrix(
        self, parameter: str, rows: range | None, columns: range | None = None, *, expert: int | None = None,
        start: int = 0,
    ) -> Plain | Fp8:  # fmt: skip
        """Rows and columns (None: all) of a matrix; an expert's rows count from `start` of its stacked parameter."""
        at = (parameter, expert, start)
        if at not in self._names:  # the experts of a layer in one tensor
            name, (_, _, width) = self._names[parameter, None, 0]
            assert expert is not None and rows is not None
            shifted = range(start + rows.start, start + rows.stop)
            stacked = self.reader.slice(name, range(expert, expert + 1), shifted, columns or range(width))
            return Plain(stacked[0].to(self.device, self.dtype))
        name, (height, width) = self._names[at]
        rows = range(height) if rows is None else rows
        parts = (rows,) if columns is None or columns == range(width) else (rows, columns)
        if name in self.reader.scaled:
            return self._fp8(name, rows, columns or range(width), parts)
        return Plain(self.reader.slice(name, *parts).to(self.device, self.dtype))

    def _fp8(self, name: str, rows: range, columns: range, parts: Sequence[range]) -> Fp8:
        pair, scale = self.reader.scaled[name], self.reader.scale(name)
        codes = self.reader.codes(name, *parts)
        try:
            codes = checked_codes(codes) if codes.numel() else codes
        except ValueError as error:
            raise self.reader.damaged_codes(name) from error
        first = (0, 0)
        match pair.scheme:
            case Fp8Scheme.BLOCK:
                high, wide = pair.block_size
                first = (rows.start % high, columns.start % wide)
                scale = scale[
                    rows.start // high : -(-rows.stop // high), columns.start // wide : -(-columns.stop // wide)
                ]
            case Fp8Scheme.CHANNEL:
                scale = scale.reshape(-1, 1)[rows.start : rows.stop]
            case Fp8Scheme.TENSOR:
                scale = scale.reshape(())
        return Fp8(codes.to(self.device), scale.clone().to(self.device), pair.scheme, pair.block_size, first)
