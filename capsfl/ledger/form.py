"""The form that all records share: what checks a field stands in its annotation, and the canonical object follows."""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, get_type_hints

from capsfl.ledger.fields import Check

SIGNATURES = ("signature", "countersignature", "possession")
"""Fields that are no part of what is signed, nor of a record's identity: who signs again says nothing new."""


@dataclass(frozen=True)
class Form:
    """A frozen value that checks its fields when it is made, by us or from a stranger's bytes.

    Raises:
        RecordError: a field that may not say what it says.
    """

    type: ClassVar[str]

    def __post_init__(self) -> None:
        for name, check in _checks(self.__class__):
            check(f"{self.type}.{name}", getattr(self, name))

    def to_canonical(self) -> dict[str, Any]:
        """Returns the canonical object; a field that is None unless somebody gives it is left out."""
        found: dict[str, Any] = {"type": self.type}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                found[field.name] = _plain(value)
        return found

    def body(self) -> dict[str, Any]:
        """Returns what signatures cover: the canonical object without them."""
        return {name: value for name, value in self.to_canonical().items() if name not in SIGNATURES}


@cache
def _checks(kind: type[Form]) -> tuple[tuple[str, Check], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((name, check) for name, hint in hints.items() for check in getattr(hint, "__metadata__", ()))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
