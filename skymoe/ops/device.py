"""A device that the user named, tried before anything is put on it."""

from __future__ import annotations

import torch

from skymoe.base.errors import ConfigError, MachineError, printable


def usable_device(name: str | torch.device, *, where: str = "") -> torch.device:
    """The torch device `name`; `where` is named in errors.

    Raises:
        ConfigError: no such kind of device, or this torch has nothing for it.
        MachineError: there is no usable CUDA device here, or not as many.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a torch device", where=where, hint="cpu or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        what = f"there is no usable CUDA device {device.index or 0} here: {count} found"
        raise MachineError(what, where=where, hint="use cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        why = printable(str(error).partition("\n")[0])
        raise ConfigError(f"{device} cannot be used here", where=where, why=why, hint="cpu or cuda:0") from error
    return device
