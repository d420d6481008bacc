"""A scan in patient axes: Hounsfield units, where they are valid, and where each voxel lies."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from capsfl.ct.errors import InconsistentGeometry

AIR_HU = -1000.0
PADDING_HU = -1500.0
"""Below this no tissue and no noise reaches: scanners and converters mark padding there (-2000, -3024)."""

SOFTEST_AIR_HU = -500.0
"""A chest CT always holds voxels below this; a picture stored as 0..255 never does."""

MAX_OBLIQUITY_DEGREES = 30.0
MAX_SHEAR_DEGREES = 0.1

# Rows: the patient directions Superior, Posterior, Left that the axes (z, y, x) follow, in LPS coordinates.
PATIENT_AXES = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


@dataclass(frozen=True)
class ScanSource:
    """Where a scan came from: allow-listed technical facts, and the way back to the series' own array.

    Nothing here identifies a patient: the pseudonym is a salted hash or the manifest's own id.
    """

    format: Literal["dicom", "nifti"]
    pseudonym: str
    shape: tuple[int, int, int]
    """Shape of the series' own array, (slice, row, column) for DICOM and the reversed (k, j, i) for NIfTI."""
    affine: tuple[tuple[float, float, float, float], ...]
    """(4, 4) map of that array's index (k, j, i, 1) to LPS mm."""
    axes: tuple[int, int, int]
    """For each of (z, y, x), the axis of the series' own array."""
    flips: tuple[bool, bool, bool]
    """For each of (z, y, x), whether the series' own array ran the other way."""
    manufacturer: str = ""
    model: str = ""
    kernel: str = ""
    slice_thickness_mm: float | None = None
    tube_voltage_kv: float | None = None
    burned_in_annotation: bool = False
    dropped_duplicates: int = 0
    interpolated_slices: int = 0
    corrected_tilt_degrees: float = 0.0
    patient_known: bool = True
    """Whether the pseudonym stands for a person; without a usable PatientID it stands for one study or folder."""

    def to_series(self, values: np.ndarray) -> np.ndarray:
        """Turn values on the scan's grid, (z, y, x), back into the order of the series' own array."""
        flipped = np.flip(values, axis=tuple(axis for axis in range(3) if self.flips[axis]))
        return np.transpose(flipped, np.argsort(self.axes))

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Rebuild a source from the JSON that `dataclasses.asdict` gave."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        for name in ("shape", "axes", "flips"):
            values[name] = tuple(values[name])
        values["affine"] = tuple(tuple(row) for row in values["affine"])
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume in Hounsfield units whose axes (z, y, x) point to the patient's Superior, Posterior, Left."""

    hu: np.ndarray
    """(z, y, x) float32 HU; -1000 where padded."""
    valid: np.ndarray
    """(z, y, x) bool, False where the scanner padded."""
    affine: np.ndarray
    """(4, 4) float64, array-order index (k, j, i, 1) to LPS (x, y, z, 1) in mm."""
    source: ScanSource

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along (z, y, x) in mm."""
        return spacing_mm(self.affine)


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Lengths of the three columns of an array-order affine, in mm along (z, y, x)."""
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0)
    return float(z), float(y), float(x)


def orient(
    affine: np.ndarray, shape: tuple[int, int, int], *, place: Path | str
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool], np.ndarray]:
    """Find the permutation and flips that turn a series' array towards Superior, Posterior, Left.

    Small rotations stay in the affine (every patient lies a little askew); only the order and the sign of
    the axes change, so no voxel is resampled.

    Args:
        affine: (4, 4) map of the series' array-order index to LPS mm.
        shape: shape of the series' array.
        place: file or folder that an error names.

    Returns:
        The series axis for each of (z, y, x), whether it is flipped, and the (4, 4) affine after both.

    Raises:
        InconsistentGeometry: the axes are sheared, degenerate or more than 30 degrees off the patient's.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all(np.isfinite(affine)) or np.any(lengths <= 0):
        raise InconsistentGeometry(place, "the affine is singular or not finite", "export the series again")
    directions = affine[:3, :3] / lengths
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > np.sin(np.deg2rad(MAX_SHEAR_DEGREES)):
        angle = np.rad2deg(np.arcsin(min(shear, 1.0)))
        raise InconsistentGeometry(
            place, f"the axes are sheared by {angle:.2f} degrees", "resample the scan to an orthogonal grid"
        )
    alignment = PATIENT_AXES @ directions
    nearest = np.argmax(np.abs(alignment), axis=1)
    axes = (int(nearest[0]), int(nearest[1]), int(nearest[2]))
    cosines = alignment[np.arange(3), nearest]
    obliquity = float(np.rad2deg(np.arccos(np.clip(np.abs(cosines).min(), 0.0, 1.0))))
    if sorted(axes) != [0, 1, 2] or obliquity > MAX_OBLIQUITY_DEGREES:
        raise InconsistentGeometry(
            place,
            f"the slices lie {obliquity:.0f} degrees off the patient's axes",
            f"reconstruct within {MAX_OBLIQUITY_DEGREES:.0f} degrees of axial, coronal or sagittal",
        )
    flips = (bool(cosines[0] < 0), bool(cosines[1] < 0), bool(cosines[2] < 0))
    oriented = np.eye(4)
    oriented[:3, 3] = affine[:3, 3]
    for target, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        column = affine[:3, axis]
        oriented[:3, target] = -column if flip else column
        if flip:
            oriented[:3, 3] += column * (shape[axis] - 1)
    return axes, flips, oriented


def to_patient_axes(values: np.ndarray, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> np.ndarray:
    """Apply what `orient` found to an array of the series; the inverse of `ScanSource.to_series`."""
    return np.flip(np.transpose(values, axes), axis=tuple(axis for axis in range(3) if flips[axis]))


def as_rows(affine: np.ndarray) -> tuple[tuple[float, float, float, float], ...]:
    """The affine as nested tuples, which hash and serialise."""
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in affine)
