"""DecodedReader: the tensors of a model directory as plain floats, whatever number format they are stored in."""

from __future__ import annotations

from skymoe.weights.reader import WeightsReader


class DecodedReader(WeightsReader):
    """Read access to the weights in a model directory. A context manager."""
