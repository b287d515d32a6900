"""CPU tensors treated as those of an accelerator: their values may not be looked at."""

import sys
from types import ModuleType

NAME = "values_may_be_read"


def lookers() -> list[ModuleType]:
    """The modules that ask whether they may look."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("varcon_loss") and hasattr(module, NAME)
    ]


def never(_: object) -> bool:
    return False


def look_at_nothing() -> None:
    """For this whole process."""
    for module in lookers():
        setattr(module, NAME, never)
