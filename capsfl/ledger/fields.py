"""What a single field of a record may hold; every refusal names the field, its value and the remedy."""

import re
import unicodedata
from typing import cast

from capsfl.ledger import canonical
from capsfl.ledger.errors import RecordError
from capsfl.ledger.keys import Verifier

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 128
_MAX_PATH = 1024


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


def check_patients(field: str, rows: object) -> None:
    """Requires a tuple of (hospital, patients, epsilon), sorted by hospital, each hospital once."""
    require(type(rows) is tuple and rows, field, rows, "give a tuple of (hospital, patients, epsilon)")
    previous = ""
    for row in cast(tuple[object, ...], rows):
        require(type(row) is tuple and len(row) == 3, field, row, "give triples of (hospital, patients, epsilon)")
        hospital, patients, epsilon = cast(tuple[str, int, str | None], row)
        check_name(field, hospital)
        check_count(f"{field}[{hospital}]", patients)
        check_figure(f"{field}[{hospital}]", epsilon)
        require(previous < hospital, field, hospital, "sort the hospitals and name each once")
        previous = hospital


def check_digest(field: str, digest: object) -> None:
    """Requires 64 lower-case hex digits."""
    fits = isinstance(digest, str) and _HEX_DIGEST.fullmatch(digest) is not None
    require(fits, field, digest, "use 64 lower-case hex digits")


def check_digests(field: str, pairs: object) -> None:
    """Requires a tuple of (path, digest) pairs, sorted by path, each path once."""
    require(type(pairs) is tuple, field, pairs, "give a tuple of (path, digest)")
    previous = ""
    for pair in cast(tuple[object, ...], pairs):
        require(type(pair) is tuple and len(pair) == 2, field, pair, "give pairs of (path, digest)")
        path, digest = cast(tuple[str, str], pair)
        check_path(field, path)
        check_digest(f"{field}[{path}]", digest)
        require(previous < path, field, path, "sort the paths and name each once")
        previous = path


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
