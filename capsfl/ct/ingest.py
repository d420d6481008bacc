"""Scans to standard volumes on disk: parallel, resumable, each volume written whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from capsfl.ct.collections import CollectionConfig, ScanEntry, is_nifti, read_collection, read_manifest
from capsfl.ct.errors import ScanError, SeveralSeries
from capsfl.ct.index import COLLECTION, INDEX, IndexEntry, read_index, write_index
from capsfl.ct.ingest_scan import BODY, MASK, IngestConfig, ingest_scan, is_current, stored_path
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.output import below, read_file, remove_file, storage_errors, write_file
from capsfl.ct.pool import each
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.salt import salted
from capsfl.ct.zarr_group import Place, parse_place
from capsfl.workers import is_gone

__all__ = ["BODY", "MASK", "IndexEntry", "IngestReport", "ingest", "read_index"]

LOCAL_HOSPITAL = "local"
"""Hospital of scans that come without a manifest."""


@dataclass(frozen=True)
class IngestReport:
    """What an ingestion did, scan by scan."""

    index: tuple[IndexEntry, ...]
    """All volumes that the index now lists."""
    written: int
    kept: int
    """Volumes that stood already, from the same source and configuration."""
    failed: tuple[tuple[str, str], ...]
    """Hospital/patient and the one-line fault of each scan that was skipped."""
    notes: tuple[str, ...] = ()
    """What the collection's importer left out, moved or drew, and what stands in the folder and is listed no more."""


def ingest(
    source: Path,
    out: Place,
    *,
    config: VolumeConfig,
    collection: CollectionConfig | None = None,
    reader: ReaderConfig | None = None,
    root: Path | None = None,
    series: str | None = None,
    processes: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> IngestReport:
    """Turn scans into standard volumes `out/<hospital>/<patient>.zarr` and list them in `out/index.csv`.

    Volumes that stand already are kept when their source files (names, sizes, times), their manifest row and
    the configuration are unchanged. A manifest or a collection defines the whole index; a single scan joins it. What
    an earlier run stored in a folder and the index lists no more stays there, and a note counts it.
    Pictures (PNG, JPEG) become picture sets instead of volumes. What a collection's classes mean, and what its
    importer has to say, is kept in `out/collection.json`. A call that is refused before it has stored a scan leaves
    nothing behind.

    Args:
        source: a CSV manifest, a folder with `manifest.csv`, a folder with one DICOM series, or a NIfTI file; for a
            collection its top folder.
        out: folder of the volumes, or the URL of one in an object store.
        config: the standard volume.
        collection: which collection the source is, and how its patients become hospitals.
        reader: what the readers may mend.
        root: folder that a manifest's paths are relative to; the manifest's folder when None.
        series: which DICOM series, for a single folder that holds several.
        processes: worker processes; as many as processors when None, and never more than scans.
        on_error: raise the first fault, or skip the scan and report it.
        progress: draw a progress bar on the console.

    Raises:
        ManifestError: the manifest is unusable, or the collection's rules cannot be met.
        WrongLayout: the source is not the collection.
        ScanError: a scan is unusable and `on_error` is "raise"; finished volumes stay.
        StorageError: `out` is read-only or full.
    """
    source, out = Path(source), parse_place(out)
    entries: tuple[ScanEntry, ...] | None = None
    previous: tuple[IndexEntry, ...] = ()
    record = None
    if collection is not None:
        found = read_collection(source, collection, root=root, reader=reader)
        entries, record = found.entries, {"name": collection.name, "classes": found.classes, "notes": found.notes}
        record["config"] = collection.model_dump(mode="json")
    elif (manifest := find_manifest(source)) is not None:
        entries = read_manifest(manifest, root)

    settings = IngestConfig(config, collection, reader or ReaderConfig())
    outcomes: dict[int, bool | ScanError] = {}
    with salted(out) as salt:
        if isinstance(out, Path):
            with storage_errors(out):
                _sweep(out)
        if entries is None:
            entries = (_single(source, series, salt),)
            previous = read_index(out) if read_file(below(out, INDEX)) is not None else ()
        for position, outcome in _outcomes(entries, out, settings, salt, processes, progress):
            if isinstance(outcome, SeveralSeries) and record is None and len(entries) == 1:
                remedy = f"{outcome.remedy}; or take each for a scan with --collection dicom-folder --series every"
                outcome = SeveralSeries(outcome.place, outcome.fault, remedy)
            if isinstance(outcome, ScanError) and on_error == "raise":
                raise outcome
            outcomes[position] = outcome

    index = {(entry.hospital, entry.patient): entry for entry in previous}
    failed: list[tuple[str, str]] = []
    for position, entry in enumerate(entries):
        outcome = outcomes[position]
        if isinstance(outcome, ScanError):
            failed.append((f"{entry.hospital}/{entry.patient}", str(outcome)))
            index.pop((entry.hospital, entry.patient), None)
            continue
        index[entry.hospital, entry.patient] = IndexEntry(
            entry.patient,
            entry.hospital,
            entry.scanner,
            entry.label,
            entry.split,
            stored_path(out, entry),
            entry.kind,
            entry.person,
        )
    write_index(out, tuple(index.values()))
    if record is not None:
        write_file(below(out, COLLECTION), f"{json.dumps(record, indent=1)}\n".encode())
    elif not previous:
        remove_file(below(out, COLLECTION))
    return IngestReport(
        index=tuple(index.values()),
        written=sum(outcome is True for outcome in outcomes.values()),
        kept=sum(outcome is False for outcome in outcomes.values()),
        failed=tuple(failed),
        notes=(*(record["notes"] if record else ()), *_unlisted(out, index.values())),
    )


def _unlisted(out: Place, index: Iterable[IndexEntry]) -> tuple[str, ...]:
    """A note about volumes of earlier runs that the index lists no more: other rules, or patients left out since.

    They are somebody's images, so they are named rather than forgotten; what may be removed the user knows.
    """
    if not isinstance(out, Path):  # an object store is not searched
        return ()
    listed = {Path(entry.path) for entry in index}
    left = sorted(path for path in out.glob("*/*.zarr") if path not in listed)
    if not left:
        return ()
    first = left[0].relative_to(out).as_posix()
    return (f"{len(left)} volumes in {out} are in the index no more (the first: {first}); remove what you do not need",)


def find_manifest(source: Path) -> Path | None:
    """The CSV that a source is or holds; None for a single scan.

    Raises:
        ScanError: the source is absent, or neither a manifest nor a scan.
    """
    if source.is_dir():
        return source / "manifest.csv" if (source / "manifest.csv").is_file() else None
    if source.suffix.lower() == ".csv":
        return source
    if not source.exists():
        raise ScanError(source, "no such file or folder", "give a manifest, a DICOM folder or a NIfTI file")
    if not is_nifti(source):
        raise ScanError(source, "not a scan", "give a CSV manifest, a DICOM folder or a .nii.gz file")
    return None


def _single(source: Path, series: str | None, salt: bytes) -> ScanEntry:
    # The path may name the patient; hashing it with the folder's salt keeps it out and stays the same.
    name = f"{source.resolve()}\n{series or ''}"
    digest = hashlib.sha256(salt + name.encode()).hexdigest()
    return ScanEntry(f"scan-{digest[:12]}", LOCAL_HOSPITAL, source, series=series)


def _sweep(out: Path) -> None:
    """Remove what killed processes of this host left beside the volumes; what another host's left, it sweeps itself."""
    for left in [*out.glob("*/.*.partial"), *out.glob("*/.*.old"), *out.glob(".*.partial")]:
        if not is_gone(left.name.split(".")[-2]):
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _outcomes(
    entries: tuple[ScanEntry, ...],
    out: Place,
    config: IngestConfig,
    salt: bytes,
    processes: int | None,
    progress: bool,
) -> Iterator[tuple[int, bool | ScanError]]:
    """Positions with True (written), False (kept) or the fault, in order of completion."""
    pending: list[int] = []
    for position, entry in enumerate(entries):
        if is_current(entry, out, config):
            yield position, False
        else:
            pending.append(position)
    tasks = [(entries[position], out, config, salt) for position in pending]
    done = len(entries) - len(pending)
    for place, outcome in each(ingest_scan, tasks, title="ingest", processes=processes, progress=progress, done=done):
        yield pending[place], outcome
