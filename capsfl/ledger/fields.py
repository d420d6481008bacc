"""What a single field of a record may hold; every refusal names the field, its value and the remedy.

The annotated types at the end are what records are made of: each says how a field is stored and what checks it.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, cast

from capsfl.ledger import canonical
from capsfl.ledger.errors import RecordError
from capsfl.ledger.keys import Verifier

_HEX = {"digest": re.compile(r"[0-9a-f]{64}"), "nonce": re.compile(r"[0-9a-f]{32}")}
_SIGNATURE = re.compile(r"([0-9a-f]{128})?")
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


def check_public_key(field: str, key: object) -> None:
    """Requires a compressed P-256 point, as bytes."""
    require(isinstance(key, bytes) and Verifier(key).is_valid, field, key, "use a compressed point of P-256")


def check_count(field: str, count: object) -> None:
    """Requires an integer from 0 to 2**53 - 1, and not a bool."""
    fits = type(count) is int and 0 <= count <= canonical.MAX_INTEGER
    require(fits, field, count, "use an integer from 0 to 2**53 - 1")


def check_figure(field: str, figure: object) -> None:
    """Requires None or the decimal string of a non-negative number."""
    fits = figure is None or (canonical.is_decimal(figure) and not str(figure).startswith("-"))
    require(fits, field, figure, "use canonical.decimal(x) of a non-negative number, or None")


def check_error(field: str, error: object) -> None:
    """Requires None or a decimal string from 0 to 1."""
    check_figure(field, error)
    require(error is None or float(str(error)) <= 1, field, error, "use a decimal string from 0 to 1, or None")


def check_digest(field: str, digest: object) -> None:
    """Requires 64 lower-case hex digits."""
    fits = isinstance(digest, str) and _HEX["digest"].fullmatch(digest) is not None
    require(fits, field, digest, "use 64 lower-case hex digits")


def check_nonce(field: str, nonce: object) -> None:
    """Requires 32 lower-case hex digits."""
    fits = isinstance(nonce, str) and _HEX["nonce"].fullmatch(nonce) is not None
    require(fits, field, nonce, "use 32 lower-case hex digits")


def check_signature(field: str, signature: object) -> None:
    """Requires 128 lower-case hex digits, or nothing yet."""
    fits = isinstance(signature, str) and _SIGNATURE.fullmatch(signature) is not None
    require(fits, field, signature, "use 128 lower-case hex digits")


def check_rows(field: str, rows: object, *checks: Check) -> None:
    """Requires a tuple of rows, each a tuple with an item per check; sorted by the first item, each of them once."""
    require(type(rows) is tuple, field, rows, f"give a tuple of rows of {len(checks)}")
    previous = ""
    for row in cast(tuple[object, ...], rows):
        require(type(row) is tuple and len(row) == len(checks), field, row, f"give rows of {len(checks)}")
        first, *rest = cast(tuple[str, ...], row)
        checks[0](field, first)
        for check, item in zip(checks[1:], rest, strict=True):
            check(f"{field}[{first[:40]}]", item)
        require(previous < first, field, first, "sort the rows and name each first item once")
        previous = first


def check_digests(field: str, pairs: object) -> None:
    """Requires a tuple of (path, digest), sorted by path, each path once."""
    check_rows(field, pairs, check_path, check_digest)


def check_errors(field: str, pairs: object) -> None:
    """Requires a tuple of (hospital id, decimal in [0, 1] or None), sorted by id, each id once."""
    check_rows(field, pairs, check_digest, check_error)


def check_figures(field: str, pairs: object) -> None:
    """Requires a tuple of (hospital id, decimal or None), sorted by id, each id once."""
    check_rows(field, pairs, check_digest, check_figure)


def check_ids(field: str, ids: object) -> None:
    """Requires a tuple of hospital ids, sorted, each once."""
    require(type(ids) is tuple, field, ids, "give a tuple of hospital ids")
    check_rows(field, tuple((member,) for member in cast(tuple[object, ...], ids)), check_digest)


def check_cohort(field: str, names: object) -> None:
    """Requires a tuple of names, each once."""
    require(type(names) is tuple, field, names, "give a tuple of names")
    for name in cast(tuple[object, ...], names):
        check_name(field, name)
    require(len(set(cast(tuple[str, ...], names))) == len(cast(tuple[str, ...], names)), field, names, "name each once")


def check_patients(field: str, rows: object) -> None:
    """Requires None, or a tuple of (hospital, patients, epsilon), sorted by hospital, each hospital once."""
    require(
        rows is None or (type(rows) is tuple and rows), field, rows, "give a tuple of (hospital, patients, epsilon)"
    )
    if rows is not None:
        check_rows(field, rows, check_name, check_count, check_figure)


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
Figure = Annotated[str | None, check_figure]
Digest = Annotated[str, check_digest]
Nonce = Annotated[str, check_nonce]
Signature = Annotated[str, check_signature]
PublicKey = Annotated[bytes, check_public_key]
Digests = Annotated[tuple[tuple[str, str], ...], check_digests]
Errors = Annotated[tuple[tuple[str, str | None], ...], check_errors]
Figures = Annotated[tuple[tuple[str, str | None], ...], check_figures]
Ids = Annotated[tuple[str, ...], check_ids]
Cohort = Annotated[tuple[str, ...], check_cohort]
Patients = Annotated[tuple[tuple[str, int, str | None], ...] | None, check_patients]
