"""Scans to standard volumes on disk: parallel, resumable, each volume written whole or not at all."""

import csv
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsfl.ct.collections import ScanEntry, Split, is_nifti, read_manifest
from capsfl.ct.dicom import read_dicom
from capsfl.ct.errors import CorruptVolume, ManifestError, ScanError, StorageError
from capsfl.ct.lungs import body_mask
from capsfl.ct.nifti import read_nifti, read_nifti_mask
from capsfl.ct.normalize import VolumeConfig, standardize
from capsfl.ct.volumes import FORMAT, VERSION, read_attributes, write_volume
from capsfl.workers import count_cores, die_with_parent, is_running

logger = logging.getLogger(__name__)

INDEX = "index.csv"
SALT = ".pseudonym-salt"
MASK = "truth"
"""Name of the manifest's mask within a stored volume."""
BODY = "body"
"""Name of the body's mask, found by `lungs.body_mask`, within a stored volume."""
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
LOCAL_HOSPITAL = "local"
"""Hospital of scans that come without a manifest."""


@dataclass(frozen=True)
class IndexEntry:
    """One stored volume."""

    patient: str
    hospital: str
    scanner: str | None
    label: int | None
    split: Split | None
    path: Path


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


def ingest(
    source: Path,
    out: Path,
    *,
    config: VolumeConfig,
    root: Path | None = None,
    series: str | None = None,
    processes: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = True,
) -> IngestReport:
    """Turn scans into standard volumes `out/<hospital>/<patient>.zarr` and list them in `out/index.csv`.

    Volumes that stand already are kept when their source files (names, sizes, times), their manifest row and
    the configuration are unchanged. A manifest defines the whole index; a single scan joins it.

    Args:
        source: a CSV manifest, a folder with `manifest.csv`, a folder with one DICOM series, or a NIfTI file.
        out: folder of the volumes.
        config: the standard volume.
        root: folder that a manifest's paths are relative to; the manifest's folder when None.
        series: which DICOM series, for a single folder that holds several.
        processes: worker processes; as many as processors when None, and never more than scans.
        on_error: raise the first fault, or skip the scan and report it.
        progress: draw a progress bar on the console.

    Raises:
        ManifestError: the manifest is unusable.
        ScanError: a scan is unusable and `on_error` is "raise"; finished volumes stay.
        StorageError: `out` is read-only or full.
    """
    source, out = Path(source), Path(out)
    with _storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        salt = _salt(out)
        _sweep(out)
    manifest = _manifest(source)
    if manifest is not None:
        entries = read_manifest(manifest, root)
        previous: tuple[IndexEntry, ...] = ()
    else:
        entries = (_single(source, series, salt),)
        previous = read_index(out) if (out / INDEX).exists() else ()

    outcomes: dict[int, bool | ScanError] = {}
    for position, outcome in _outcomes(entries, out, config, salt, processes, progress):
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
            entry.patient, entry.hospital, entry.scanner, entry.label, entry.split, _volume_path(out, entry)
        )
    _write_index(out, tuple(index.values()))
    return IngestReport(
        index=tuple(index.values()),
        written=sum(outcome is True for outcome in outcomes.values()),
        kept=sum(outcome is False for outcome in outcomes.values()),
        failed=tuple(failed),
    )


def read_index(out: Path) -> tuple[IndexEntry, ...]:
    """Read the list of volumes that `ingest` left in a folder.

    Raises:
        ManifestError: the folder holds no index, or it is damaged.
    """
    path = Path(out) / INDEX
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return tuple(
            IndexEntry(
                patient=row["patient"],
                hospital=row["hospital"],
                scanner=row["scanner"] or None,
                label=int(row["label"]) if row["label"] else None,
                split=cast(Split, row["split"]) if row["split"] else None,
                path=Path(out) / row["volume"],
            )
            for row in rows
        )
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file; run `capsfl ingest SOURCE {out}` first") from error
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ManifestError(f"{path}: not a volume index ({error}); ingest the scans again") from error


def _manifest(source: Path) -> Path | None:
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


def _salt(out: Path) -> bytes:
    """The folder's secret for pseudonyms, made whole or not at all and readable by its owner only."""
    path = out / SALT
    if not path.exists():
        draft = out / f"{SALT}.{os.getpid()}.partial"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(secrets.token_bytes(32))
            with suppress(FileExistsError):  # another process was faster, and its salt counts
                os.link(draft, path)
        finally:
            draft.unlink()
    return path.read_bytes()


def _sweep(out: Path) -> None:
    """Remove what killed processes of this machine left beside the volumes."""
    for left in [*out.glob("*/.*.partial"), *out.glob("*/.*.old"), *out.glob(".*.partial")]:
        owner = left.name.split(".")[-2]
        if not owner.isdigit() or is_running(int(owner)):
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _outcomes(
    entries: tuple[ScanEntry, ...],
    out: Path,
    config: VolumeConfig,
    salt: bytes,
    processes: int | None,
    progress: bool,
) -> Iterator[tuple[int, bool | ScanError]]:
    """Positions with True (written), False (kept) or the fault, in order of completion."""
    columns = (
        TextColumn("ingest"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    pending: list[int] = []
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("ingest", total=len(entries))
        for position, entry in enumerate(entries):
            if _is_current(entry, out, config):
                bar.advance(task)
                yield position, False
            else:
                pending.append(position)
        workers = min(processes or count_cores(), len(pending))
        if workers <= 1:
            for position in pending:
                yield position, _ingest_one(entries[position], out, config, salt)
                bar.advance(task)
            return
        # Threads of the main process (jax, TensorStore) do not survive a fork, so workers start afresh.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
            with _one_thread_each():
                futures = {
                    pool.submit(_ingest_one, entries[position], out, config, salt): position for position in pending
                }
            try:
                for future in as_completed(futures):
                    bar.advance(task)
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start workers with one BLAS thread each: their products are small and the processors are taken."""
    added = [name for name in BLAS_THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _ingest_one(entry: ScanEntry, out: Path, config: VolumeConfig, salt: bytes) -> Literal[True] | ScanError:
    """Read, standardize and store one scan; a fault of the scan is returned, one of the disk raised."""
    try:
        key = _source_key(entry, config)
        if is_nifti(entry.image):
            scan = read_nifti(entry.image)
        else:
            scan = read_dicom(entry.image, series=entry.series, salt=salt)
        masks = {}
        if entry.mask is not None:
            masks[MASK] = read_nifti_mask(entry.mask, like=scan, threshold=entry.mask_threshold)
        volume = standardize(scan, config=config, masks=masks)
        masks = {**volume.masks, BODY: body_mask(volume.hu, volume.spacing_mm)}
        volume = replace(volume, masks=masks)
    except ScanError as error:
        return error
    except OSError as error:
        return ScanError(entry.image, f"cannot be read ({error.strerror or error})", "check the files")
    if volume.cropped_lung_fraction > 0:
        logger.warning(
            "%s/%s: %.1f %% of the lung box lies outside the standard extent",
            entry.hospital,
            entry.patient,
            100 * volume.cropped_lung_fraction,
        )
    attributes = {
        "patient": entry.patient,
        "hospital": entry.hospital,
        "scanner": entry.scanner,
        "label": entry.label,
        "source_key": key,
        "config": config.model_dump(mode="json"),
    }
    write_volume(_volume_path(out, entry), volume, attributes=attributes)
    return True


def _is_current(entry: ScanEntry, out: Path, config: VolumeConfig) -> bool:
    try:
        return read_attributes(_volume_path(out, entry)).get("source_key") == _source_key(entry, config)
    except CorruptVolume:
        return False


def _source_key(entry: ScanEntry, config: VolumeConfig) -> str:
    """Digest of everything a stored volume depends on; files count by name, size and time of change."""
    files: list[tuple[str, int, int]] = []
    for path in (entry.image, entry.mask):
        if path is None:
            continue
        members = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for member in members:
            status = member.stat()
            files.append((str(member.relative_to(path)), status.st_size, status.st_mtime_ns))
    row = {name: value for name, value in asdict(entry).items() if name not in ("image", "mask", "split")}
    # The window is applied when a volume is read, so changing it needs no new volumes.
    settings = config.model_dump(mode="json", exclude={"window"})
    record = {"format": [FORMAT, VERSION], "files": files, "row": row, "config": settings}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _volume_path(out: Path, entry: ScanEntry) -> Path:
    return out / entry.hospital / f"{entry.patient}.zarr"


def _write_index(out: Path, index: tuple[IndexEntry, ...]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["patient", "hospital", "scanner", "label", "split", "volume"])
    for entry in index:
        label = "" if entry.label is None else entry.label
        volume = entry.path.relative_to(out).as_posix()
        writer.writerow([entry.patient, entry.hospital, entry.scanner or "", label, entry.split or "", volume])
    partial = out / f".{INDEX}.{os.getpid()}.partial"
    with _storage_errors(out / INDEX):
        try:
            partial.write_text(text.getvalue(), encoding="utf-8")
            os.replace(partial, out / INDEX)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose a writable folder"
        ) from error
