"""The mixture: sample number -> sample, a pure function of (fingerprint, seed, number).

Nothing is remembered between calls. So resuming needs one integer; the stream does not depend on world size,
micro-batch or workers (rank r simply asks for other numbers); and sample 10^9 costs as much as sample 0:

    number --interleave--> source, ordinal --divmod--> epoch, position --permute--> window of the token file

Every source is shuffled anew in each epoch of its own, by a permutation that takes no memory, and within an epoch every
window is seen exactly once. The shuffle of a source depends on the seed and on the source, not on its neighbours:
adding a source to a mixture does not reshuffle the others.

Left out: shuffling tokens across window borders (windows are cut at the same places in every epoch), curricula.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.indexed import IndexedDataset
from skymoe.data.interleave import Interleave
from skymoe.data.packing import Batch, Sample, cut, num_windows
from skymoe.data.permutation import key_of, permute

I64 = npt.NDArray[np.int64]

_ALGORITHM = 1  # part of the fingerprint: raise it when the same numbers would give other samples


@dataclass(frozen=True)
class Source:
    """A token file in a mixture. `weight` is its share of the samples, relative to the others'."""

    prefix: Path
    weight: float = 1.0
    name: str = ""


class Location(NamedTuple):
    """Where samples come from."""

    source_B: I64
    epoch_B: I64
    window_B: I64


class Mixture:
    """An endless, shuffled, weighted stream over several token files.

    Args:
        sources: at least one; names must differ (default: the last part of the prefix).
        sequence_length: T, tokens of one sample.
        seed: which shuffle.
        isolate_documents: keep documents apart in attention and loss (skymoe.data.packing).
        vocab_size: refuse tokens that the model does not have.

    Attributes:
        names: of the sources.
        fingerprint: equal exactly when all samples are equal; checkpoints keep it and refuse another.

    Raises:
        ConfigError: no sources, equal names, wrong weights.
        FormatError: a token file is unreadable, too short for one target, or does not hold whole numbers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        sequence_length: int,
        seed: int,
        isolate_documents: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.names = tuple(source.name or Path(source.prefix).name for source in sources)
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"the names of the sources must differ, got {list(self.names)}")
        if sequence_length < 1:
            raise ConfigError(f"a sequence needs at least one token, got {sequence_length}")
        self.sequence_length, self.seed, self.isolate_documents = sequence_length, seed, isolate_documents
        self._vocab_size = vocab_size
        self._interleave = Interleave([source.weight for source in sources])
        self.datasets = tuple(open_tokens(source.prefix) for source in sources)
        self._windows = tuple(num_windows(dataset.num_tokens, sequence_length) for dataset in self.datasets)
        self._keys = tuple(
            key_of(seed, name, dataset.fingerprint) for name, dataset in zip(self.names, self.datasets, strict=True)
        )
        self.fingerprint = self._fingerprint()

    def locate(self, index_B: I64) -> Location:
        """Source, epoch of that source and window of each sample number."""
        source_B, ordinal_B = self._interleave.locate(index_B)
        epoch_B, window_B = np.empty_like(ordinal_B), np.empty_like(ordinal_B)
        for source in np.unique(source_B):
            mine_B = source_B == source
            epochs, positions = np.divmod(ordinal_B[mine_B], self._windows[source])
            epoch_B[mine_B] = epochs
            window_B[mine_B] = permute(positions, self._windows[source], key=self._keys[source], epochs=epochs)
        return Location(source_B, epoch_B, window_B)

    def gather(self, index_B: I64) -> Batch:
        """The samples of any numbers, in that order."""
        if len(index_B) and index_B.min() < 0:
            raise IndexError(f"sample {index_B.min()}: sample numbers begin at 0")
        location = self.locate(index_B)
        parts, rows = [], []
        for source in np.unique(location.source_B):
            row_N = np.flatnonzero(location.source_B == source)
            start_N = location.window_B[row_N] * self.sequence_length
            parts.append(self._cut(int(source), start_N))
            rows.append(row_N)
        if len(parts) == 1:
            return parts[0]._replace(source_B=location.source_B)
        order_B = np.argsort(np.concatenate(rows)) if rows else np.empty(0, np.int64)
        if not parts:
            return self._cut(0, np.empty(0, np.int64))
        merged = Batch._make(np.concatenate(arrays)[order_B] for arrays in zip(*parts, strict=True))
        return merged._replace(source_B=location.source_B)

    def sample(self, index: int) -> Sample:
        """Sample number `index`."""
        tokens, targets, document_ids, positions, valid, source = self.gather(np.array([index]))
        return Sample(tokens[0], targets[0], document_ids[0], positions[0], valid[0], int(source[0]))

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source has been seen whole after `num_samples` samples."""
        counts = self._interleave.count(num_samples)
        return {n: count / size for n, count, size in zip(self.names, counts, self._windows, strict=True)}

    def _cut(self, source: int, start_N: I64) -> Batch:
        return cut(
            self.datasets[source],
            start_N,
            self.sequence_length,
            isolate_documents=self.isolate_documents,
            vocab_size=self._vocab_size,
        )

    def _fingerprint(self) -> str:
        content = {
            "algorithm": _ALGORITHM,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "isolate_documents": self.isolate_documents,
            "quotas": self._interleave.quotas,
            "sources": [[name, data.fingerprint] for name, data in zip(self.names, self.datasets, strict=True)],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def batch(mixture: Mixture, first_index: int, count: int) -> Batch:
    """Samples [first_index, first_index + count) of the mixture."""
    return mixture.gather(np.arange(first_index, first_index + count))


def open_tokens(prefix: Path) -> IndexedDataset:
    """The token file at `prefix`, holding whole numbers and at least one pair (token, next token).

    Raises:
        FormatError: otherwise.
    """
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind not in "iu":
        raise FormatError(f"this file holds {dataset.dtype}, not token numbers", where=dataset.idx_path)
    if dataset.num_tokens < 2:
        raise FormatError(f"{dataset.num_tokens} tokens are too few to predict one", where=dataset.bin_path)
    return dataset
