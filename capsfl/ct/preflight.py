"""A hospital's scans looked at before they are ingested: what there is, what is refused and why, what stands twice."""

import secrets
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capsfl.ct.collections import CollectionConfig, ScanEntry, is_nifti, read_collection, read_manifest
from capsfl.ct.errors import WrongLayout
from capsfl.ct.ingest import LOCAL_HOSPITAL, find_manifest
from capsfl.ct.pool import each
from capsfl.ct.preflight_scan import LOOK_SIDE, SeriesFinding, examine
from capsfl.ct.reader import ReaderConfig

ALIKE = 0.98
"""Correlation of two small pictures from which on they show one slice: in COVID-CT two pairs of different patients
reach 0.992, and all others stay below 0.966."""
MAX_COMPARED = 20_000
BLOCK = 512


@dataclass(frozen=True)
class Shared:
    """Two entries that have something of one patient in common."""

    first: tuple[str, str]
    """Hospital and patient."""
    second: tuple[str, str]
    same_patient: bool
    """Whether both carry the same patient's id."""
    images: int
    """Images whose pixels are the same in both."""
    alike: int = 0
    """Pictures of the one that look like one of the other, though sizes, windows or formats differ."""
    classes_differ: bool = False
    """Whether the two carry different labels: one is wrong, or the patient has both."""

    @property
    def across_hospitals(self) -> bool:
        """Whether two hospitals hold it: then they are not independent, and a test patient may have been trained on."""
        return self.first[0] != self.second[0]


@dataclass(frozen=True)
class Preflight:
    """What a source holds."""

    findings: tuple[SeriesFinding, ...]
    shared: tuple[Shared, ...]
    classes: tuple[str, ...] = ("negative", "positive")
    notes: tuple[str, ...] = ()
    """What the importer left out or passed by."""

    @property
    def hospitals(self) -> tuple[str, ...]:
        """Names in alphabetical order."""
        return tuple(sorted({finding.hospital for finding in self.findings}))


def check(
    source: Path,
    *,
    collection: CollectionConfig | None = None,
    reader: ReaderConfig | None = None,
    root: Path | None = None,
    processes: int | None = None,
    progress: bool = True,
) -> Preflight:
    """Look at every series of a source without storing anything.

    A folder without a manifest is taken for a tree of DICOM series, each one a scan. Hashes that find duplicates are
    keyed by a secret of this call and end with it. The result holds no path, no identifier and no date; scanner and
    kernel are left out where a word of the patient's own tags stands in them.

    Args:
        source: a manifest, a collection, a folder tree, or a NIfTI file.
        collection: which collection the source is.
        reader: what the readers may mend.
        root: folder that a manifest's paths are relative to.
        processes: worker processes; as many as cores when None.
        progress: draw a progress bar on the console.

    Raises:
        ManifestError, WrongLayout, NoSeries: the source as a whole is unusable.
    """
    source, reader, salt = Path(source), reader or ReaderConfig(), secrets.token_bytes(32)
    guessed = collection is None and find_manifest(source) is None and not is_nifti(source)
    if guessed:
        collection = CollectionConfig(name="dicom-folder", series="every", split="study")
    if collection is not None:
        try:
            found = read_collection(source, collection, root=root, reader=reader, all_series=True)
        except WrongLayout as error:
            if not guessed:
                raise
            remedy = "say what the folder is with --collection, such as nifti-folder or image-folder"
            raise WrongLayout(error.place, error.fault, remedy) from None
        entries, classes, notes = found.entries, found.classes, found.notes
    else:
        manifest = find_manifest(source)
        entries = read_manifest(manifest, root) if manifest else (ScanEntry("patient-0001", LOCAL_HOSPITAL, source),)
        classes, notes = ("negative", "positive"), ()
    tasks = [(entry, reader, salt) for entry in entries]
    results = dict(each(examine, tasks, title="check", processes=processes, progress=progress))
    findings = tuple(results[position] for position in range(len(entries)))
    pictures = sum(finding.images for finding in findings if finding.looks)
    if pictures > MAX_COMPARED:
        notes = (*notes, f"{pictures} pictures are too many to look for those that are alike; equal ones are found")
    return Preflight(findings, find_shared(findings, entries), classes, notes)


def find_shared(findings: tuple[SeriesFinding, ...], entries: tuple[ScanEntry, ...]) -> tuple[Shared, ...]:
    """Pairs of entries of different patients, or of two hospitals, that share a patient's id, pixels or looks.

    Series of one patient within a hospital belong together and are no pair.
    """
    by_identity: dict[str, list[int]] = defaultdict(list)
    by_digest: dict[str, set[int]] = defaultdict(set)
    for place, finding in enumerate(findings):
        if finding.identity:
            by_identity[finding.identity].append(place)
        for digest in finding.digests:
            by_digest[digest].add(place)
    images: dict[tuple[int, int], int] = defaultdict(int)
    for places in by_digest.values():
        for pair in _pairs(sorted(places)):
            images[pair] += 1
    people = {pair for places in by_identity.values() for pair in _pairs(places)}
    alike = _alike(findings, entries)
    shared = []
    for pair in sorted(people | images.keys() | alike.keys()):
        one, other = pair
        if entries[one].whose == entries[other].whose and entries[one].hospital == entries[other].hospital:
            continue
        labels = {findings[place].label for place in pair} - {None}
        shared.append(
            Shared(
                (findings[one].hospital, findings[one].patient),
                (findings[other].hospital, findings[other].patient),
                same_patient=pair in people,
                images=images.get(pair, 0),
                alike=max(0, alike.get(pair, 0) - images.get(pair, 0)),
                classes_differ=len(labels) > 1,
            )
        )
    return tuple(shared)


def _alike(findings: tuple[SeriesFinding, ...], entries: tuple[ScanEntry, ...]) -> dict[tuple[int, int], int]:
    """Pairs of entries of different patients by how many pictures of the first look like one of the second."""
    places = [place for place, finding in enumerate(findings) if finding.looks]
    looks = [np.frombuffer(findings[place].looks, np.int8).reshape(-1, LOOK_SIDE**2) for place in places]
    owner = np.repeat(places, [len(look) for look in looks])
    if not places or len(owner) > MAX_COMPARED:
        return {}
    vectors = np.concatenate(looks).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    people = {whose: number for number, whose in enumerate(dict.fromkeys(entry.whose for entry in entries))}
    person = np.array([people[entries[place].whose] for place in owner])
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    for start in range(0, len(owner), BLOCK):
        close = vectors[start : start + BLOCK] @ vectors.T > ALIKE
        close &= person[start : start + BLOCK, None] != person[None, :]
        for row, column in np.argwhere(close):
            one, other = owner[start + row], owner[column]
            if one < other:
                found[int(one), int(other)].add(int(start + row))
    return {pair: len(pictures) for pair, pictures in found.items()}


def _pairs(places: list[int]) -> list[tuple[int, int]]:
    """Neighbours first; all pairs of a few, and of many only those with the first, which say as much."""
    if len(places) > 20:
        return [(places[0], other) for other in places[1:]]
    return [(first, second) for index, first in enumerate(places) for second in places[index + 1 :]]
