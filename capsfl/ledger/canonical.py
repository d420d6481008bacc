"""One byte string per value: the JSON subset that is hashed and signed.

Objects with sorted ASCII keys, arrays, strings, integers below 2**53, booleans and null, written without
white space and with every character outside ASCII escaped. Floats have no place in signed bytes (two
programs print one number differently); they travel as decimal strings made by `decimal`.

The standard `json.loads` accepts NaN, duplicate keys, integers of thousands of digits and lone surrogates,
and its recursion is limited only by the stack, so `decode` guards before it and compares bytes after it.
"""

import json
import math
import re
from typing import Any

from capsfl.ledger.errors import CanonicalError

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
MAX_INTEGER = (1 << 53) - 1  # the largest integer every JSON reader holds exactly

_INTEGER_CHARACTERS = len(str(-MAX_INTEGER))
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,308})(\.[0-9]{1,308})?(e[+-]?[0-9]{1,3})?")


def encode(value: object) -> bytes:
    """Returns the canonical bytes of a value built of dict, list, str, int, bool and None, exactly.

    Raises:
        CanonicalError: a float, a subclass or another type, a key that is not ASCII, an integer of 2**53 or
            more, a lone surrogate, nesting deeper than 8, or more than 1 MiB.
    """
    _check(value, 1)
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    if len(text) > MAX_BYTES:
        raise CanonicalError(f"a value of {len(text)} bytes is over the limit of {MAX_BYTES}: split it")
    return text.encode("ascii")


def decode(data: bytes) -> Any:
    """Returns the value whose canonical bytes are `data`, in bounded time and memory.

    Raises:
        CanonicalError: anything but the exact bytes `encode` gives for some value.
    """
    if len(data) > MAX_BYTES:
        raise CanonicalError(f"{len(data)} bytes are over the limit of {MAX_BYTES}")
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise CanonicalError(f"byte {error.start} is not ASCII: write other characters as \\u escapes") from None
    _check_depth(text)
    try:
        value = json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise CanonicalError(f"not JSON: {error.msg} at byte {error.pos}") from None
    # A key that was there twice, NaN, another spelling of a number or a character: all of it shows here.
    if encode(value) != data:
        raise CanonicalError("these bytes are not the canonical form of their value: write it with encode()")
    return value


def decimal(x: float) -> str:
    """Returns the shortest decimal string that reads back as exactly the same float.

    Raises:
        CanonicalError: NaN, an infinity, or something that is not a number.
    """
    if type(x) not in (float, int) or not math.isfinite(x):
        raise CanonicalError(f"{x!r} is not a finite number: record None where there is no figure")
    return repr(float(x))


def is_decimal(text: object) -> bool:
    """Tells whether `text` is a decimal string of a finite number, as `decimal` writes them."""
    return type(text) is str and _DECIMAL.fullmatch(text) is not None and math.isfinite(float(text))


def _check(value: object, depth: int) -> None:
    # Exact types: a subclass (IntEnum, a string with its own hash) may print as something else than it is.
    kind = type(value)
    if value is None or kind is bool:
        return
    if kind is int:
        if not -MAX_INTEGER <= value <= MAX_INTEGER:  # pyright: ignore[reportOperatorIssue]
            raise CanonicalError("an integer is 2**53 or more: write it as a string")
    elif kind is str:
        try:
            value.encode("utf-8")  # pyright: ignore[reportAttributeAccessIssue]
        except UnicodeEncodeError as error:
            raise CanonicalError(f"a string holds a lone surrogate at character {error.start}") from None
    elif kind is list or kind is dict:
        if depth > MAX_DEPTH:
            raise CanonicalError(f"nested deeper than {MAX_DEPTH}: flatten the value")
        for item in value:  # pyright: ignore[reportGeneralTypeIssues]
            if kind is dict:
                if type(item) is not str or not item.isascii():
                    raise CanonicalError(f"key {str(item)[:40]!r} is not an ASCII string")
                _check(value[item], depth + 1)  # pyright: ignore[reportIndexIssue]
            else:
                _check(item, depth + 1)
    elif kind is float:
        raise CanonicalError(f"{value!r} is a float: write it with decimal()")
    else:
        raise CanonicalError(f"a {kind.__name__} has no canonical form: use dict, list, str, int, bool or None")


def _check_depth(text: str) -> None:
    # Before parsing, because the parser recurses. Once escapes are gone, every second piece between quotes
    # lies outside strings; in text that is not JSON the parser stops before this count could mislead it.
    depth = 0
    for outside in text.replace("\\\\", "").replace('\\"', "").split('"')[::2]:
        for character in outside:
            if character in "[{":
                depth += 1
                if depth > MAX_DEPTH:
                    raise CanonicalError(f"nested deeper than {MAX_DEPTH}")
            elif character in "]}":
                depth -= 1


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_CHARACTERS:
        raise CanonicalError(f"an integer of {len(digits)} characters is 2**53 or more: write it as a string")
    return int(digits)
