"""What operators run, and how much they write."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Their names in order, as ``mm.default`` or ``c10d.allreduce_``, those of backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))

    def collectives(self) -> list[str]:
        """Those of c10d, without their overloads."""
        return [name.split(".")[1] for name in self.names if name.startswith("c10d.")]

    def count(self, *beginnings: str) -> int:
        """How many have a name that begins so."""
        return sum(name.startswith(beginnings) for name in self.names)


class LargestWritten(TorchDispatchMode):
    """Elements of the largest tensor that an operator wrote; or of the largest new matrix."""

    elements = 0

    def __init__(self, new_matrices: bool = False) -> None:
        super().__init__()
        self.new_matrices = new_matrices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        unwritten = func.is_view or func.overloadpacket is torch.ops.aten.new_empty
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(part, Tensor) or unwritten:
                continue
            if not self.new_matrices or (part.ndim > 1 and all(part is not a for a in args)):
                self.elements = max(self.elements, part.numel())
        return result
