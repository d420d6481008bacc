"""Names and digests of what is predicted: a result is found again by the one and told from another by the other."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from capsfl.report.predictions import safe_name


class Names:
    """Names from folders and files below a place; two of the same get numbers."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._taken: set[str] = set()

    def of(self, path: Path) -> str:
        """The next free name for a folder or file."""
        below = path.relative_to(self._place).parts if path.is_relative_to(self._place) else ()
        wanted = safe_name("-".join(below) or self._place.resolve().name)
        name, turn = wanted, 1
        while name.casefold() in self._taken:
            turn += 1
            name = f"{wanted}-{turn}"
        self._taken.add(name.casefold())
        return name


def beside(out: Path | None, place: Path, files: Iterable[Path]) -> list[Path]:
    """The files below a place that are no results: `out` may lie there, and what is in it was predicted before."""
    if out is None:
        return list(files)
    home, results = place.resolve(), out.resolve()
    return [path for path in files if not (home / path.relative_to(place)).is_relative_to(results)]


def digest_of_files(files: Sequence[Path]) -> str:
    """SHA-256 over the files' own digests, in no order: whoever holds the files can compute it."""
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
