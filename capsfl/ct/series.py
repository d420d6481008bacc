"""All CT series of a folder tree, from their headers alone: what each is, and why one cannot be used."""

import hashlib
import logging
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pydicom.uid import UID
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsfl.ct import errors
from capsfl.ct.deidentify import identifying_words, shown
from capsfl.ct.errors import ScanError, printable
from capsfl.ct.headers import FileFinding, examine_files
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import orient
from capsfl.ct.slices import DicomSlice, SliceFacts
from capsfl.ct.stack import Stack, stack_slices
from capsfl.ct.walk import walk
from capsfl.workers import count_cores, die_with_parent

logger = logging.getLogger(__name__)

MIN_SLICES = 4
FILES_PER_WORKER = 1000
"""Starting a process costs as much as some hundred headers."""
FILES_PER_TASK = 64
FILES_WORTH_A_BAR = 300
SAME_COSINES = 2e-3
SAME_SPACING = 1e-3
PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True, eq=False)
class Series:
    """One CT series of a folder tree: the slices that share study, series, stack, orientation and grid."""

    place: Path
    """The folder that was searched; messages name it."""
    number: int
    """Position in the list, from 1; `series` of `read_dicom` accepts it."""
    uid: str
    """Series Instance UID, an identifier: `series` accepts it or its ending, tables and logs must not show it."""
    pseudonym: str
    """Salted hash of the patient's id: equal for one patient under one salt."""
    files: tuple[Path, ...]
    """All files of the series, those for which it is refused among them."""
    slices: tuple[DicomSlice, ...]
    """Slices whose headers are usable, in no order; `read_series` decodes them."""
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float]
    """Between rows, between columns."""
    slice_spacing_mm: float | None
    """From the positions; None where they form no stack."""
    plane: str
    """axial, coronal or sagittal, whichever the slices are nearest to; empty without slices."""
    facts: SliceFacts
    """Of the first slice, without what identifies the patient."""
    transfer_syntax: str
    """Name of the encoding of the pixels; empty without slices."""
    stack: Stack | None
    """The regular grid; None where the series is refused for its geometry."""
    refusal: ScanError | None
    """Why the series cannot be read; None when nothing in its headers speaks against it."""

    def __str__(self) -> str:
        """One line for a list to choose from; it begins with the number, which `series` accepts."""
        kernel = self.facts.kernel or "unknown"
        line = f"{self.number}: {len(self.slices)} slices of {self.rows}x{self.columns}, "
        line += f"{self.pixel_spacing_mm[0]:.3f} mm, kernel {kernel}"
        if self.slices and self.slices[0].stack:
            line += f", stack {self.slices[0].stack}"
        return line


@dataclass(frozen=True, eq=False)
class FolderListing:
    """What a folder tree holds."""

    place: Path
    series: tuple[Series, ...]
    """Every CT series, usable or refused, in the order of study and series UID."""
    skipped: tuple[tuple[Path, str], ...]
    """Files that are no part of a CT volume, with the reason."""
    broken: tuple[tuple[Path, ScanError], ...]
    """Files that claim to be DICOM and cannot be read, and folders that cannot be opened."""

    @property
    def accepted(self) -> tuple[Series, ...]:
        """The series that nothing in their headers speaks against."""
        return tuple(series for series in self.series if series.refusal is None)

    def found(self) -> str:
        """What there was besides CT, counted, for a message."""
        reasons = Counter(reason for _, reason in self.skipped)
        return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4)) or "nothing"


def scan_folder(
    source: Path | Iterable[Path],
    *,
    config: ReaderConfig | None = None,
    salt: bytes | None = None,
    processes: int | None = None,
    progress: bool = False,
) -> FolderListing:
    """List every CT series of a folder tree with its geometry, its scanner, and the reason if it is refused.

    Headers are read and no pixels, in several processes where there are thousands of files. Every file is accounted
    for: it belongs to a series, or it is skipped with a reason, or it is broken.

    Args:
        source: a folder (searched in depth, links followed), a file, or the files themselves.
        config: what may be mended, and so is not refused.
        salt: secret bytes for the pseudonyms; fresh ones when None.
        processes: at most so many processes; as many as cores when None.
        progress: draw a progress bar on the console where there are more than some hundred files.

    Raises:
        NoSeries: there is no such file or folder, or it is empty.
    """
    salt = salt or secrets.token_bytes(32)
    place, paths, named, skipped, broken = _paths(source)
    findings = _examine(paths, named=named, processes=processes, progress=progress)
    for finding in findings:
        if finding.skipped:
            skipped.append((finding.path, finding.skipped))
        elif finding.error is not None and not finding.series:
            broken.append((finding.path, finding.error))
    for path, reason in skipped:
        logger.info("%s skipped: %s", printable(path), reason)
    series = _series(place, findings, config or ReaderConfig(), salt)
    return FolderListing(place, _with_broken(series, broken), tuple(skipped), tuple(broken))


def _paths(
    source: Path | Iterable[Path],
) -> tuple[Path, list[Path], bool, list[tuple[Path, str]], list[tuple[Path, ScanError]]]:
    if not isinstance(source, str | Path):
        paths = [Path(path) for path in source]
        return (paths[0].parent if paths else Path()), paths, True, [], []
    place = Path(source)
    if place.is_file():
        return place, [place], True, [], []
    if not place.is_dir():
        fault = "not a file or folder" if place.exists() else "no such file or folder"
        raise errors.NoSeries(place, fault, "check the path")
    tree = walk(place)
    if not (tree.files or tree.skipped or tree.unreadable):
        raise errors.NoSeries(place, "the folder is empty", "give the folder that holds the series' files")
    return place, tree.files, False, tree.skipped, tree.unreadable


def _examine(paths: list[Path], *, named: bool, processes: int | None, progress: bool) -> list[FileFinding]:
    tasks = [paths[at : at + FILES_PER_TASK] for at in range(0, len(paths), FILES_PER_TASK)]
    columns = (TextColumn("headers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    findings: list[FileFinding] = []
    console = Console(stderr=True)
    hidden = not progress or len(paths) < FILES_WORTH_A_BAR or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("headers", total=len(paths))
        workers = min(processes or count_cores(), len(paths) // FILES_PER_WORKER)
        if workers <= 1:
            for part in tasks:
                findings += examine_files(part, named=named)
                bar.advance(task, len(part))
            return findings
        # The parser is Python, so threads would wait for one another; a worker imports the parser and no more.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
            try:
                for part in pool.map(partial(examine_files, named=named), tasks):
                    findings += part
                    bar.advance(task, len(part))
            finally:
                pool.shutdown(cancel_futures=True)
    return findings


def _series(place: Path, findings: list[FileFinding], config: ReaderConfig, salt: bytes) -> tuple[Series, ...]:
    slices: dict[tuple[str, str], list[DicomSlice]] = defaultdict(list)
    faults: dict[tuple[str, str], list[FileFinding]] = defaultdict(list)
    for finding in findings:
        for file in finding.slices:
            slices[file.study, file.series].append(file)
        if finding.error is not None and finding.series:
            faults[finding.study, finding.series].append(finding)
    for finding in findings:
        if finding.skipped.endswith("not CT") and (finding.study, finding.series) in slices:
            error = errors.CorruptFile(
                finding.path, f"part of a CT series, but {finding.skipped}", "export the series again"
            )
            faults[finding.study, finding.series].append(replace(finding, error=error))
    found: list[Series] = []
    for key in sorted(slices.keys() | faults.keys()):
        groups = _grids(slices.get(key, []))
        faulty = faults.get(key, [])
        if not groups:
            found.append(_unusable(place, len(found) + 1, key, faulty, salt))
            continue
        refusal = faulty[0].error if faulty else None
        if refusal is None and len(groups[0]) >= MIN_SLICES:
            # A slice of another grid is part of the series all the same: without it the volume may lack one.
            odd = next((group for group in groups[1:] if len(group) < MIN_SLICES), None)
            if odd is not None:
                refusal = errors.InconsistentGeometry(
                    odd[0].path, "its grid or orientation differs from the rest of its series", "remove it"
                )
        for group in groups:
            one = _described(place, len(found) + 1, group, refusal, config, salt)
            found.append(replace(one, files=(*one.files, *(finding.path for finding in faulty))))
    return tuple(found)


def _grids(slices: list[DicomSlice]) -> list[list[DicomSlice]]:
    """Slices of one series by stack, orientation, rows x columns and pixel spacing, the largest group first."""
    groups: list[list[DicomSlice]] = []
    for file in slices:
        for group in groups:
            first = group[0]
            if (
                (first.stack, first.rows, first.columns) == (file.stack, file.rows, file.columns)
                and _near(first.orientation, file.orientation, SAME_COSINES)
                and _near(first.pixel_spacing, file.pixel_spacing, SAME_SPACING * min(first.pixel_spacing))
            ):
                group.append(file)
                break
        else:
            groups.append([file])
    return sorted(groups, key=len, reverse=True)


def _near(first: Sequence[float], second: Sequence[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(first, second, strict=True))


def _described(
    place: Path, number: int, group: list[DicomSlice], refusal: ScanError | None, config: ReaderConfig, salt: bytes
) -> Series:
    first = group[0]
    stack = None
    orientation = np.mean([file.orientation for file in group], axis=0)
    try:
        if len(group) < MIN_SLICES:
            fault = f"{len(group)} slice{'s' if len(group) != 1 else ''} in the series"
            raise errors.TooFewSlices(place, fault, f"a volume needs at least {MIN_SLICES}")
        stack = stack_slices(
            np.array([file.position for file in group]),
            orientation,
            first.pixel_spacing,
            names=[file.name for file in group],
            place=place,
            config=config,
        )
        if len(stack.order) < MIN_SLICES:
            fault = f"{len(stack.order)} different slices"
            raise errors.TooFewSlices(place, fault, f"a volume needs at least {MIN_SLICES}")
        shape = stack.grid(first.rows, first.columns)
        if np.prod(shape, dtype=float) > config.max_voxels:
            raise errors.TooLarge(
                place, f"{shape[0]} x {shape[1]} x {shape[2]} voxels", f"raise reader.max_voxels = {config.max_voxels}"
            )
        orient(stack.affine, shape, place=place)
    except ScanError as error:
        refusal = refusal or error
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    # Two people without an id and a study are told apart by their folders.
    identity = first.patient or f"folder {first.path.parent}"
    return Series(
        place=place,
        number=number,
        uid=first.series,
        pseudonym=pseudonym(identity, salt),
        files=tuple(dict.fromkeys(file.path for file in group)),
        slices=tuple(group),
        rows=first.rows,
        columns=first.columns,
        pixel_spacing_mm=first.pixel_spacing,
        slice_spacing_mm=stack.spacing_mm if stack else None,
        plane=PLANES[2 - int(normal.argmax())],
        facts=_screened(first),
        transfer_syntax=UID(first.syntax).name,
        stack=stack,
        refusal=refusal,
    )


def _screened(first: DicomSlice) -> SliceFacts:
    """A slice's facts, those withheld in which somebody's own words stand: they go on to volumes, lists and pages."""
    facts = first.facts
    words = identifying_words(first.path)
    return replace(
        facts,
        manufacturer=shown(facts.manufacturer, words),
        model=shown(facts.model, words),
        kernel=shown(facts.kernel, words),
    )


def _unusable(place: Path, number: int, key: tuple[str, str], faulty: list[FileFinding], salt: bytes) -> Series:
    """A series none of whose files can be used."""
    return Series(
        place=place,
        number=number,
        uid=key[1],
        pseudonym=pseudonym(key[0], salt),
        files=tuple(finding.path for finding in faulty),
        slices=(),
        rows=0,
        columns=0,
        pixel_spacing_mm=(0.0, 0.0),
        slice_spacing_mm=None,
        plane="",
        facts=SliceFacts(),
        transfer_syntax="",
        stack=None,
        refusal=faulty[0].error,
    )


def _with_broken(series: tuple[Series, ...], broken: list[tuple[Path, ScanError]]) -> tuple[Series, ...]:
    """Refuse a series that has its folder for itself when a file there is broken: it may be one of its slices."""
    at_fault = {path.parent: error for path, error in reversed(broken)}
    tenants: dict[Path, set[tuple[str, str]]] = defaultdict(set)
    for one in series:
        for file in one.files:
            tenants[file.parent].add((one.uid, one.pseudonym))
    result = []
    for one in series:
        homes = {file.parent for file in one.files if len(tenants[file.parent]) == 1}
        errors_at_home = [at_fault[home] for home in sorted(homes) if home in at_fault]
        refused = one.refusal is None and errors_at_home
        result.append(replace(one, refusal=errors_at_home[0]) if refused else one)
    return tuple(result)


def pseudonym(identity: str, salt: bytes) -> str:
    """Salted hash that stands for a patient."""
    return f"patient-{hashlib.sha256(salt + identity.encode(errors='surrogateescape')).hexdigest()[:16]}"
