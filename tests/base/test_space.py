from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from skymoe.base import space
from skymoe.base.errors import MachineError


def test_free_space(tmp_path: Path) -> None:
    assert space.free_space(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert space.lack_of_space(5, 5) == ""
    assert space.lack_of_space(2_000_000_000, 10_000_000) == "not enough space: 2.00 GB needed, 0.01 GB free"
    space.ensure_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(MachineError, match="not enough space"):
        space.ensure_free_space(tmp_path / "not" / "yet", shutil.disk_usage(tmp_path).total * 2)
