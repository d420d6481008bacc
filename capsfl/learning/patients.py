"""One patient as the models see it: the standard volume cut to the field around the lungs."""

from dataclasses import dataclass

import numpy as np

from capsfl.ct.ingest import BODY, MASK, IndexEntry
from capsfl.ct.volumes import read_volume


@dataclass(frozen=True)
class Patient:
    """A standard volume and what is known about it.

    Attributes:
        name: pseudonym.
        hospital: where the scan was made.
        scanner: scanner id; empty when unknown.
        label: class of the patient, 1 for disease in the two-class case; None when unknown.
        hu: `(z, y, x)` float32 Hounsfield units.
        body: `(z, y, x)` bool, the body without couch and blankets; nothing outside it is ever marked.
        truth: `(z, y, x)` bool mask of what is to be segmented; None when nobody drew one.
        spacing_mm: voxel size along z, y and x.
        split: the use that the manifest fixes (train, validation, test); None where it is to be drawn.
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

    @property
    def key(self) -> str:
        """Names the patient in the study: pseudonyms are unique within a hospital only."""
        return f"{self.hospital}/{self.name}"


def load_patient(entry: IndexEntry, *, field: tuple[int, int, int] | None) -> Patient:
    """Reads one ingested scan and cuts the central `field` voxels `(z, y, x)` out of it.

    Raises:
        ValueError: the field is larger than the volume or not divisible by 8.
    """
    volume, _ = read_volume(entry.path)
    window = central_field(volume.hu.shape, field)
    truth = volume.masks.get(MASK)
    return Patient(
        name=entry.patient,
        hospital=entry.hospital,
        scanner=entry.scanner or "",
        label=entry.label,
        hu=np.asarray(volume.hu[window], np.float32),
        body=np.asarray(volume.masks[BODY][window], bool),
        truth=None if truth is None else np.asarray(truth[window], bool),
        spacing_mm=volume.spacing_mm,
        split=entry.split,
    )


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
