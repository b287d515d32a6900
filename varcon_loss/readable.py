"""May Python look at a tensor's values?"""

import torch
from torch import Tensor


def values_may_be_read(tensor: Tensor) -> bool:
    """True where looking at values neither synchronises a device nor breaks a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
