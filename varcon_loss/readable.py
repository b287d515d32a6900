"""May Python look at a tensor's values, may autograd keep them, and in which precision?"""

import contextlib

import torch
from torch import Tensor


def values_may_be_read(tensor: Tensor) -> bool:
    """True where looking at values neither synchronises a device nor breaks a compiled graph."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(tensor).__name__ != "FakeTensor"


def keepable(tensor: Tensor) -> Tensor:
    """A copy where autograd would refuse the tensor: made in inference mode, and used outside."""
    if (
        not torch.compiler.is_compiling()
        and tensor.is_inference()
        and not torch.is_inference_mode_enabled()
    ):
        return tensor.clone()
    return tensor


def without_autocast(features: object) -> contextlib.AbstractContextManager[object]:
    """The dtypes as they are: what the loss computes in is its own choice."""
    device_type = features.device.type if isinstance(features, Tensor) else "cpu"
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
