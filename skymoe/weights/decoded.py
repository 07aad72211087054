"""DecodedReader: a model directory whose FP8 weights read like any others.

Whoever reads a *model* (load, inspect, the conversions) opens it with this; a directory without FP8 goes straight
through to `WeightsReader`. With FP8 each weight appears under its own name in bfloat16 or float32, decoded when it is
read, and its scale does not appear. `scales.py` decides what belongs together; this file checks the values: a scale
must be finite and positive, a code must not be NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError, printable
from skymoe.base.log import logger
from skymoe.ops.fp8 import MAX_SCALE, dequantize
from skymoe.weights.buffers import torch_dtype
from skymoe.weights.header import TensorInfo
from skymoe.weights.reader import WeightsReader
from skymoe.weights.scales import Scaled, list_tensors

_DAMAGED = "the file is damaged; download it again"


class DecodedReader(WeightsReader):
    """Read access to the weights in `directory`, FP8 decoded. A context manager.

    Args:
        directory: a model directory; its config.json says how it is quantized.
        decode_to: the type that FP8 weights are given out in; other weights keep theirs. The product of code and scale
            is formed in fp32; bfloat16 rounds it once more.

    Raises:
        FormatError: anything missing, broken, hostile, or quantized in a way that is not read.
    """

    def __init__(self, directory: Path | str, *, decode_to: DType = DType.BFLOAT16) -> None:
        assert decode_to in (DType.BFLOAT16, DType.FLOAT32, DType.FLOAT16)
        super().__init__(directory)
        self._dtype = torch_dtype(decode_to)
        try:
            self._listing = list_tensors(self.directory, super().names(), decode_to=decode_to)
        except BaseException:
            self.close()
            raise
        if passed := self._listing.activation_scales:
            logger.info("%s: %d scales of activations are not used (%s, ...)", directory, len(passed), passed[0])

    @property
    def scaled(self) -> Mapping[str, Scaled]:
        """The weights that are FP8 on disk, and how."""
        return self._listing.scaled

    def names(self) -> dict[str, TensorInfo]:
        """Every tensor's dtype and shape as it is given out, in the order of the files."""
        return dict(self._listing.tensors)

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` on the CPU.

        Raises:
            FormatError: there is none, or its codes or scales are damaged.
        """
        self._check_name(name)
        stored = super().tensor(name)
        return self._decode(name, stored) if name in self.scaled else stored

    def slice(self, name: str, *parts: range) -> Tensor:
        """A part of tensor `name`, as in `WeightsReader`: only that part of an FP8 weight is read and decoded."""
        if not parts:
            return self.tensor(name)
        self._check_name(name)
        stored = super().slice(name, *parts)
        if name not in self.scaled:
            return stored
        row, column = (*(part.start for part in parts), 0)[:2]
        return self._decode(name, stored, first=(row, column))

    def codes(self, name: str, *parts: range) -> Tensor:
        """The stored codes of the FP8 weight `name`, or of a part of it as in `slice`; not looked at."""
        self._check_name(name)
        assert name in self.scaled
        return super().slice(name, *parts) if parts else super().tensor(name)

    def scale(self, name: str) -> Tensor:
        """The scale of the FP8 weight `name`, fp32, as it lies in the file.

        Raises:
            FormatError: it is damaged.
        """
        self._check_name(name)
        pair = self.scaled[name]
        scale = super().tensor(pair.scale).float()
        sound = (scale > 0) & (scale <= MAX_SCALE)  # False for NaN
        if not bool(sound.all()):
            what = f"tensor {pair.scale} holds the scale {float(scale.flatten()[~sound.flatten()][0]):g}"
            raise FormatError(what, where=self.directory, why="scales are finite and above zero", hint=_DAMAGED)
        return scale

    def damaged_codes(self, name: str) -> FormatError:
        """What to say where a code of the FP8 weight `name` is NaN."""
        what = f"tensor {printable(name)} holds a code that is not a number (0x7F or 0xFF)"
        return FormatError(what, where=self.directory, hint=_DAMAGED)

    def _decode(self, name: str, codes_OI: Tensor, *, first: tuple[int, int] = (0, 0)) -> Tensor:
        pair, scale = self.scaled[name], self.scale(name)
        try:
            return dequantize(codes_OI, scale, pair.scheme, self._dtype, pair.block_size, first=first)
        except ValueError as error:
            raise self.damaged_codes(name) from error

    def _check_name(self, name: str) -> None:
        if name not in self._listing.tensors:
            raise FormatError(f"there is no tensor {printable(name)}", where=self.directory)
