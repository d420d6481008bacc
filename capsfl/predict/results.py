"""The folder of one result: it appears whole, in place of the same source's older result and of nothing else."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_name(out: Path, wanted: str, digest: str) -> str:
    """The name under which a source's older result lies, or the next one under which nothing does."""
    name, turn = wanted, 1
    while (out / name).exists() and _source_of(out / name) != digest:
        turn += 1
        name = f"{wanted}-{turn}"
    return name


@contextmanager
def result_folder(out: Path, name: str) -> Iterator[Path]:
    """A draft of a result's folder, renamed to its place in `out` when it is written, gone if it could not be."""
    draft = out / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        _replace(draft, out / name)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _source_of(folder: Path) -> str | None:
    """The digest of what a folder holds the result of; None where it holds something else."""
    try:
        return json.loads((folder / "prediction.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(draft: Path, place: Path) -> None:
    """Renames a folder to its place; what stood there goes first, since a folder cannot be renamed over another."""
    old = draft.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    draft.rename(place)
    shutil.rmtree(old, ignore_errors=True)
