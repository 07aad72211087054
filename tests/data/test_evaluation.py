from __future__ import annotations

import numpy as np
import pytest

from skymoe.base.errors import ConfigError, FormatError
from skymoe.data.evaluation import EvaluationWindows


@pytest.mark.parametrize("length", [1, 7, 64, 500])
def test_every_token_is_scored_once_in_order(write_tokens, length: int) -> None:
    windows = EvaluationWindows(write_tokens("x", 211), length)
    targets = np.concatenate([batch.targets_BT.ravel() for batch in windows.batches(3)])
    assert targets[targets >= 0].tolist() == list(range(1, 211))
    assert len(windows) == -(-210 // length)


def test_a_limit_takes_windows_from_the_whole_file(write_tokens) -> None:
    windows = EvaluationWindows(write_tokens("x", 1001), 10, limit=4)
    assert windows.batch(0, 99).tokens_BT[:, 0].tolist() == [0, 250, 500, 750]
    assert len(EvaluationWindows(write_tokens("y", 1001), 10, limit=4000)) == 100


def test_isolation_as_in_training(write_tokens) -> None:
    batch = EvaluationWindows(write_tokens("x", [[1, 2, 3], [4, 5]]), 4, isolate_documents=True).batch(0, 1)
    assert batch.targets_BT.tolist() == [[2, 3, -100, 5]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0]]


def test_refusals(write_tokens) -> None:
    with pytest.raises(FormatError, match="too few"):
        EvaluationWindows(write_tokens("x", [[1]]), 4)
    with pytest.raises(ConfigError):
        EvaluationWindows(write_tokens("y", [[1, 2]]), 4, limit=0)
