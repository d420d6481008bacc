"""One patient as the models see it: the standard volume cut to the field around the lungs, or pictures of the scan."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from capsfl.ct.collections.entries import whose
from capsfl.ct.errors import ScanError
from capsfl.ct.ingest import BODY, MASK, IndexEntry
from capsfl.ct.normalize import LUNG_WINDOW, VolumeConfig, scanner_window
from capsfl.ct.pictures import PictureSet, read_pictures
from capsfl.ct.volumes import read_volume


@dataclass(frozen=True)
class Patient:
    """A standard volume, or pictures, and what is known about the patient.

    Attributes:
        name: pseudonym.
        hospital: where the scan was made.
        scanner: scanner id; empty when unknown.
        label: class of the patient, 1 for disease in the two-class case; None when unknown.
        hu: `(z, y, x)` float32 Hounsfield units; without a voxel where there are pictures instead.
        body: `(z, y, x)` bool, the body without couch and blankets; nothing outside it is ever marked.
        truth: `(z, y, x)` bool mask of what is to be segmented; None when nobody drew one.
        spacing_mm: voxel size along z, y and x.
        split: the use that the manifest fixes (train, validation, test); None where it is to be drawn.
        pictures: grey pictures of slices, which are not Hounsfield units; None for a volume.
        window_hu: level and width in HU of the window that the networks see the volume through.
        person: pseudonym of the person, one in all hospitals, who may have several scans; None where `name` says it.
        truth_outside: marked voxels of the volume that the field left out; nothing can find them, so they are missed.
    """

    name: str
    hospital: str
    scanner: str
    label: int | None
    hu: np.ndarray
    body: np.ndarray
    truth: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    split: str | None = None
    pictures: PictureSet | None = None
    window_hu: tuple[float, float] = LUNG_WINDOW
    truth_outside: int = 0
    person: str | None = None

    @property
    def is_marked(self) -> bool:
        """Whether somebody marked a voxel, be it one that the field left out."""
        return self.truth is not None and bool(self.truth.any() or self.truth_outside)

    @property
    def key(self) -> str:
        """Names the scan in the study: pseudonyms are unique within a hospital only."""
        return f"{self.hospital}/{self.name}"

    @property
    def whose(self) -> tuple[str, str]:
        """What tells people apart: scans that share it are never split, and count as one person."""
        return whose(self.hospital, self.name, self.person)


def number_people(patients: Iterable[Patient]) -> np.ndarray:
    """Numbers people 0, 1, ... in the order of their first scans: `(scans,)` integers, equal for one person's scans."""
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault(patient.whose, len(numbers)) for patient in patients], int)


def people_of(patients: Sequence[Patient]) -> np.ndarray | None:
    """The numbers of `number_people` for a bootstrap by person; None where everybody has one scan."""
    numbers = number_people(patients)
    return numbers if len(np.unique(numbers)) < len(numbers) else None


def permute_labels(patients: Sequence[Patient], *, seed: int) -> tuple[Patient, ...]:
    """Deals the labels anew among the people of each hospital, so that they say nothing about the scans any more.

    A hospital keeps its share of every class. All labelled scans of a person get one label, that of another person's
    first labelled scan; scans without a label stay without.
    """
    generator = np.random.default_rng(seed)
    labels: dict[str, dict[tuple[str, str], int]] = {}
    for patient in patients:
        if patient.label is not None:
            labels.setdefault(patient.hospital, {}).setdefault(patient.whose, patient.label)
    dealt = {
        hospital: dict(zip(own, generator.permutation(list(own.values())).tolist(), strict=True))
        for hospital, own in sorted(labels.items())
    }
    return tuple(p if p.label is None else replace(p, label=dealt[p.hospital][p.whose]) for p in patients)


def load_patient(
    entry: IndexEntry, *, field: tuple[int, int, int] | None, volumes: VolumeConfig | None = None
) -> Patient:
    """Reads one ingested scan and cuts the central `field` voxels `(z, y, x)` out of it; pictures are left whole.

    Args:
        entry: the scan in the index.
        field: voxels along z, y and x; all of them when None.
        volumes: says which window the scan is seen through, see `scanner_window`; the fixed one when None.

    Raises:
        ValueError: the field is larger than the volume or not divisible by 8.
        ScanError: each scanner is to have its window, and the entry's has none.
    """
    known = (entry.patient, entry.hospital, entry.scanner or "", entry.label)
    if entry.kind == "pictures":
        pictures, _ = read_pictures(entry.path)
        nothing = np.empty((0, 0, 0), np.float32)
        return Patient(*known, nothing, nothing > 0, None, (1.0, 1.0, 1.0), entry.split, pictures, person=entry.person)
    window_hu = _window_of(entry, volumes or VolumeConfig())
    volume, _ = read_volume(entry.path)
    window = central_field(volume.hu.shape, field)
    truth = volume.masks.get(MASK)
    return Patient(
        *known,
        hu=np.asarray(volume.hu[window], np.float32),
        body=np.asarray(volume.masks[BODY][window], bool),
        truth=None if truth is None else np.asarray(truth[window], bool),
        spacing_mm=volume.spacing_mm,
        split=entry.split,
        window_hu=window_hu,
        truth_outside=0 if truth is None else int(truth.sum() - truth[window].sum()),
        person=entry.person,
    )


def _window_of(entry: IndexEntry, volumes: VolumeConfig) -> tuple[float, float]:
    try:
        return scanner_window(volumes, entry.scanner)
    except ScanError as error:
        place = f"{entry.hospital}/{entry.patient}, {error.place}"
        raise ScanError(place, error.fault, error.remedy) from None


def central_field(shape: tuple[int, ...], field: tuple[int, int, int] | None) -> tuple[slice, slice, slice]:
    """Returns the slices that cut the central `field` voxels out of a volume of `shape`.

    Raises:
        ValueError: see `load_patient`.
    """
    size = field or shape
    for axis, (have, want) in enumerate(zip(shape, size, strict=True)):
        if want > have or want % 8:
            name = "zyx"[axis]
            raise ValueError(f"data.field = {size}: {want} voxels along {name}; expected a multiple of 8 up to {have}")
    start = [(have - want) // 2 for have, want in zip(shape, size, strict=True)]
    z, y, x = (slice(a, a + want) for a, want in zip(start, size, strict=True))
    return z, y, x
