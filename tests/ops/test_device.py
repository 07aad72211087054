from __future__ import annotations

import pytest
import torch

from skymoe.base.errors import ConfigError, MachineError
from skymoe.ops.device import usable_device


def test_a_device_that_is_there() -> None:
    assert usable_device("cpu") == usable_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "abacus", "", "cpu:x", "cuda:-1"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(ConfigError, match="not a torch device"):
        usable_device(name)


def test_what_this_machine_does_not_have() -> None:
    with pytest.raises(MachineError, match="^here: .*no usable CUDA device 99"):
        usable_device("cuda:99", where="here")
    with pytest.raises(ConfigError, match="xpu|hpu"):
        usable_device("hpu")
