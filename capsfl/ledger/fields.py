"""What a single field of a record may hold; every refusal names the field, its value and the remedy.

The annotated types at the end are what records are made of: each says how a field is stored and what checks it.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any, cast

from capsfl.ledger import canonical
from capsfl.ledger.errors import RecordError
from capsfl.ledger.keys import Verifier

_MAX_NAME = 128
_MAX_PATH = 1024


Check = Callable[[str, object], None]
"""Takes the name of a field and its value, and raises a RecordError unless the value may stand there."""


def require(holds: object, field: str, value: object, remedy: str) -> None:
    """Raises a RecordError of one line unless `holds`."""
    if not holds:
        raise RecordError(f"{field}: {shorten(value)}: {remedy}")


def shorten(value: object) -> str:
    """Returns a value's repr, cut to what fits on a line."""
    text = repr(value[:40] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def check_that(holds: Callable[[Any], object], remedy: str) -> Check:
    """Returns a check that requires a value for which `holds` is true."""
    return lambda field, value: require(holds(value), field, value, remedy)


def optional(check: Check) -> Check:
    """Returns a check that lets None stand as well."""
    return lambda field, value: None if value is None else check(field, value)


def matching(pattern: str, remedy: str) -> Check:
    """Returns a check that requires a string of this pattern."""
    return check_that(lambda text: isinstance(text, str) and re.fullmatch(pattern, text) is not None, remedy)


def rows_of(*checks: Check) -> Check:
    """Returns a check that requires a tuple of rows, each a tuple with an item per check.

    The rows are sorted by their first item, each of which stands there once.
    """

    def check(field: str, rows: object) -> None:
        require(type(rows) is tuple, field, rows, f"give a tuple of rows of {len(checks)}")
        previous = ""
        for row in cast(tuple[object, ...], rows):
            require(type(row) is tuple and len(row) == len(checks), field, row, f"give rows of {len(checks)}")
            first, *rest = cast(tuple[str, ...], row)
            checks[0](field, first)
            for check_item, item in zip(checks[1:], rest, strict=True):
                check_item(f"{field}[{first[:40]}]", item)
            require(previous < first, field, first, "sort the rows and name each first item once")
            previous = first

    return check


check_public_key = check_that(
    lambda key: isinstance(key, bytes) and Verifier(key).is_valid, "use a compressed point of P-256"
)
"""Requires a compressed P-256 point, as bytes."""
check_flag = check_that(lambda flag: type(flag) is bool, "use true or false")
"""Requires a bool."""
check_count = check_that(
    lambda count: type(count) is int and 0 <= count <= canonical.MAX_INTEGER, "use an integer from 0 to 2**53 - 1"
)
"""Requires an integer from 0 to 2**53 - 1, and not a bool."""
check_number = check_that(
    lambda number: canonical.is_decimal(number) and not number.startswith("-"),
    "use canonical.decimal(x) of a non-negative number",
)
"""Requires the decimal string of a non-negative number."""
check_share = check_that(
    lambda share: canonical.is_decimal(share) and not share.startswith("-") and float(share) <= 1,
    "use a decimal string from 0 to 1",
)
"""Requires a decimal string from 0 to 1."""
check_digest = matching("[0-9a-f]{64}", "use 64 lower-case hex digits")
"""Requires 64 lower-case hex digits."""
check_nonce = matching("[0-9a-f]{32}", "use 32 lower-case hex digits")
"""Requires 32 lower-case hex digits."""
check_signature = matching("([0-9a-f]{128})?", "use 128 lower-case hex digits")
"""Requires 128 lower-case hex digits, or nothing yet."""


def check_ids(field: str, ids: object) -> None:
    """Requires a tuple of hospital ids, sorted, each once."""
    require(type(ids) is tuple, field, ids, "give a tuple of hospital ids")
    rows_of(check_digest)(field, tuple((member,) for member in cast(tuple[object, ...], ids)))


def check_cohort(field: str, names: object) -> None:
    """Requires a tuple of names, each once."""
    require(type(names) is tuple, field, names, "give a tuple of names")
    for name in cast(tuple[object, ...], names):
        check_name(field, name)
    require(len(set(cast(tuple[str, ...], names))) == len(cast(tuple[str, ...], names)), field, names, "name each once")


def check_patients(field: str, rows: object) -> None:
    """Requires None, or a tuple of (hospital, patients, epsilon), sorted by hospital, each hospital once."""
    require(rows != (), field, rows, "give a tuple of (hospital, patients, epsilon)")
    optional(rows_of(check_name, check_count, optional(check_number)))(field, rows)


def check_name(field: str, name: object) -> None:
    """Requires a short printable name that is no path."""
    # Names end up in file names, tables and pages: nothing that walks out of a folder or hides on a screen.
    fits = (
        isinstance(name, str)
        and 0 < len(name) <= _MAX_NAME
        and name.isprintable()
        and name == name.strip()
        and name == unicodedata.normalize("NFKC", name)  # or two names would look the same
        and name not in (".", "..")
        and not set("/\\") & set(name)
    )
    require(fits, field, name, f"use 1 to {_MAX_NAME} printable characters (NFKC) without / or \\")


def check_path(field: str, path: object) -> None:
    """Requires a relative path of printable parts."""
    fits = (
        isinstance(path, str)
        and 0 < len(path) <= _MAX_PATH
        and path.isprintable()
        and "\\" not in path
        and not {"", ".", ".."} & set(path.split("/"))
    )
    require(fits, field, path, "use a relative path with parts between single slashes, none of them . or ..")


Name = Annotated[str, check_name]
Count = Annotated[int, check_count]
Figure = Annotated[str | None, optional(check_number)]
Digest = Annotated[str, check_digest]
Nonce = Annotated[str, check_nonce]
Signature = Annotated[str, check_signature]
PublicKey = Annotated[bytes, check_public_key]
Digests = Annotated[tuple[tuple[str, str], ...], rows_of(check_path, check_digest)]
Errors = Annotated[tuple[tuple[str, str | None], ...], rows_of(check_digest, optional(check_share))]
Figures = Annotated[tuple[tuple[str, str | None], ...], rows_of(check_digest, optional(check_number))]
Ids = Annotated[tuple[str, ...], check_ids]
Cohort = Annotated[tuple[str, ...], check_cohort]
Patients = Annotated[tuple[tuple[str, int, str | None], ...] | None, check_patients]
