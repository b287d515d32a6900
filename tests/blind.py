"""CPU tensors treated as those of an accelerator: their values may not be looked at."""

import sys
from collections.abc import Callable


def look_at_nothing(set_attribute: Callable[..., None] = setattr) -> None:
    """For this whole process, or until what ``set_attribute`` is a method of undoes it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("varcon_loss") and hasattr(module, "values_may_be_read"):
            set_attribute(module, "values_may_be_read", lambda tensor: False)
