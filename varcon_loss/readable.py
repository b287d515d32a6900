"""Where Python may read the values of a tensor, and where autocast must not change dtypes."""

import contextlib

import torch
from torch import Tensor


def values_may_be_read(tensor: Tensor) -> bool:
    """True where reading values neither synchronises a device nor breaks a compiled graph."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(tensor).__name__ != "FakeTensor"


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """The loss chooses its own dtypes."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
