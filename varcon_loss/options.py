"""What a call of the loss may be told, beside its samples: names and defaults, once."""

from typing import Any, NamedTuple

from torch import Tensor

from varcon_loss import checks


class Options(NamedTuple):
    """The arguments that `VarConLoss` and `varcon_loss` share, under their public names."""

    temperature: float = 0.1
    epsilon: float = 0.02
    num_classes: int | None = None  # C
    normalize: bool = True
    reduction: str = "mean"
    ignore_index: int | None = -100
    weight: Tensor | None = None  # [C], of classes
    leave_one_out: bool = False
    process_group: object | None = None
    exchange: str = "auto"
    impl: str = "auto"


def check_options(**given: Any) -> Options:
    """The arguments by name, checked; ``num_classes`` is filled in from ``weight``.

    Numbers of any kind, of numpy too, become Python's: compiled graphs know no others.

    Raises:
        TypeError, ValueError: they say what cannot be.
    """
    options = Options(**given)
    temperature, epsilon = checks.check_temperatures(options.temperature, options.epsilon)
    ignore_index, num_classes = options.ignore_index, options.num_classes
    if ignore_index is not None:
        ignore_index = checks.check_ignore_index(ignore_index)
    normalize = checks.switch("normalize", options.normalize)
    leave_one_out = checks.switch("leave_one_out", options.leave_one_out)
    checks.check_choices(options.reduction, options.impl)
    num_classes = checks.resolve_num_classes(num_classes, options.weight)
    checks.check_exchange(options.process_group, options.exchange, num_classes)
    checked = {
        "temperature": temperature,
        "epsilon": epsilon,
        "num_classes": num_classes,
        "ignore_index": ignore_index,
        "normalize": normalize,
        "leave_one_out": leave_one_out,
    }
    return Options(**{**given, **checked})
