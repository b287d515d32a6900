"""Records with some of their fields changed."""

from typing import Any, TypeVar

Record = TypeVar("Record", bound=tuple)


def changed(record: Record, **fields: Any) -> Record:
    """As `_replace` of a named tuple, which the compiler of torch 2.6 does not trace."""
    kind: Any = type(record)
    kept = {name: getattr(record, name) for name in kind._fields}
    return kind(**{**kept, **fields})
