"""What a CSV beside a collection says about its patients, series or folders."""

from dataclasses import dataclass, replace
from pathlib import Path

from capsfl.ct.collections.entries import ScanEntry
from capsfl.ct.collections.manifest import read_label, read_name, read_split, read_table
from capsfl.ct.errors import ManifestError

KEYS = ("patient", "series", "folder")
FACTS = ("hospital", "scanner", "label", "split")


@dataclass(frozen=True)
class Found:
    """An entry, and by which names a table may speak of it."""

    entry: ScanEntry
    patient: str
    """The patient as the collection names it; never stored."""
    series: str = ""
    """SeriesInstanceUID, for DICOM."""
    folder: str = ""
    """Folder of the scan, from the collection's top, with `/`."""


def apply_table(found: tuple[Found, ...], path: Path) -> tuple[tuple[Found, ...], tuple[str, ...]]:
    """Replace what the folder says by what the table says; returns the entries and notes.

    A row speaks of a patient (all his scans), a series, or a folder and what is below it.

    Raises:
        ManifestError: names file:line of a row that is unusable, speaks of nothing here, or is the second of its kind.
    """
    table = read_table(path, required=(), optional=KEYS + FACTS)
    keys = [key for key in KEYS if key in table[0][1]]
    if len(keys) != 1:
        raise ManifestError(
            f"{path}:1: expected one of the columns {', '.join(KEYS)}; found {', '.join(keys) or 'none'}"
        )
    (key,) = keys
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    for line, cells in table:
        name = cells.pop(key).strip("/")
        if name in rows:
            raise ManifestError(f"{path}:{line}: {key} {name!r} stands in line {rows[name][0]} already; keep one")
        rows[name] = line, cells
    used: set[str] = set()
    result = []
    for item in found:
        names = _names(item, key)
        name = next((name for name in names if name in rows), None)
        if name is None:
            result.append(item)
            continue
        used.add(name)
        line, cells = rows[name]
        result.append(replace(item, entry=_replaced(f"{path}:{line}", item.entry, cells)))
    if unused := [name for name in rows if name not in used]:
        raise ManifestError(f"{path}:{rows[unused[0]][0]}: no scan with {key} {unused[0]!r} here; remove the row")
    missing = len(found) - sum(any(name in rows for name in _names(item, key)) for item in found)
    notes = (f"{missing} of {len(found)} scans have no row in {path.name}",) if missing else ()
    return tuple(result), notes


def _names(item: Found, key: str) -> list[str]:
    """What a row may call an entry by; of folders the nearest first."""
    if key != "folder":
        return [getattr(item, key)]
    parts = item.folder.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _replaced(place: str, entry: ScanEntry, cells: dict[str, str]) -> ScanEntry:
    facts = {}
    if cells.get("hospital"):
        facts["hospital"] = read_name(place, "hospital", cells["hospital"])
    if cells.get("scanner"):
        facts["scanner"] = cells["scanner"]
    if cells.get("label"):
        facts["label"] = read_label(place, cells["label"])
    if cells.get("split"):
        facts["split"] = read_split(place, cells["split"])
    return replace(entry, **facts)
