"""The list of what an ingestion stored, `index.csv`, and the collection it came from, `collection.json`."""

import csv
import io
import json
from dataclasses import dataclass
from typing import Any, Literal, cast

from capsfl.ct.collections.entries import Split
from capsfl.ct.errors import ManifestError
from capsfl.ct.output import below, read_file, write_file
from capsfl.ct.zarr_group import Place, parse_place

INDEX = "index.csv"
COLLECTION = "collection.json"
COLUMNS = ("patient", "hospital", "scanner", "label", "split", "volume", "kind", "person")


@dataclass(frozen=True)
class IndexEntry:
    """One stored volume, or the stored pictures of one patient."""

    patient: str
    hospital: str
    scanner: str | None
    label: int | None
    split: Split | None
    path: Place
    kind: Literal["volume", "pictures"] = "volume"
    """What `path` holds: `volumes.read_volume` or `pictures.read_pictures` reads it."""
    person: str | None = None
    """Pseudonym of the person, one in all hospitals, where somebody may have several scans; None where `patient` says
    who it is."""


def read_index(out: Place) -> tuple[IndexEntry, ...]:
    """Read the list of volumes and pictures that `ingest` left in a folder or an object store.

    Raises:
        ManifestError: there is no index, or it is damaged.
        StorageError: it cannot be read.
    """
    path = below(out, INDEX)
    content = read_file(path)
    if content is None:
        raise ManifestError(f"{path}: no such file; run `capsfl ingest SOURCE {out}` first")
    try:
        return tuple(_entry(row, out) for row in csv.DictReader(io.StringIO(content.decode(), newline="")))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ManifestError(f"{path}: not a volume index ({error}); ingest the scans again") from error


def write_index(out: Place, index: tuple[IndexEntry, ...]) -> None:
    """Write the list, whole or not at all.

    Raises:
        StorageError: the folder is read-only or full.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in index:
        label = "" if entry.label is None else entry.label
        volume = str(entry.path).removeprefix(f"{parse_place(out)}/")
        row = (entry.patient, entry.hospital, entry.scanner or "", label, entry.split or "", volume, entry.kind)
        writer.writerow((*row, entry.person or ""))
    write_file(below(out, INDEX), text.getvalue().encode())


def read_collection_record(out: Place) -> dict[str, Any] | None:
    """Read which collection a folder's volumes came from: `name`, `classes`, `notes`, `config`; None if from none.

    Raises:
        ManifestError: the record is damaged.
        StorageError: it cannot be read.
    """
    path = below(out, COLLECTION)
    content = read_file(path)
    if content is None:
        return None
    try:
        record = json.loads(content)
        return {**record, "classes": tuple(record["classes"]), "notes": tuple(record["notes"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{path}: not a collection's record ({error}); ingest the scans again") from error


def _entry(row: dict[str, str], out: Place) -> IndexEntry:
    kind = row.get("kind") or "volume"
    if kind not in ("volume", "pictures"):
        raise ValueError(f"kind is {kind!r}")
    return IndexEntry(
        patient=row["patient"],
        hospital=row["hospital"],
        scanner=row["scanner"] or None,
        label=int(row["label"]) if row["label"] else None,
        split=cast(Split, row["split"]) if row["split"] else None,
        path=below(out, row["volume"]),
        kind=cast(Literal["volume", "pictures"], kind),
        person=row.get("person") or None,  # an index of an earlier version has none
    )
