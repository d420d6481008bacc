"""NIfTI volumes and masks to the patient's axes; NIfTI speaks RAS, everything here speaks LPS."""

import hashlib
from pathlib import Path

import numpy as np

from capsfl.ct import errors
from capsfl.ct.nifti_file import load_nifti
from capsfl.ct.pixels import HIGHEST_HU
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import AIR_HU, PADDING_HU, SOFTEST_AIR_HU, Scan, ScanSource, as_rows, orient, to_patient_axes

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
REVERSE = np.eye(4)[[2, 1, 0, 3]]
"""Exchanges the index orders (i, j, k) of NIfTI and (k, j, i) of our arrays."""


def read_nifti(path: Path, *, config: ReaderConfig | None = None) -> Scan:
    """Read a CT volume in Hounsfield units; padding (below -1500 HU, or not finite) becomes -1000, invalid.

    Raises:
        WrongFormat: not NIfTI, not one volume, without geometry, or not Hounsfield units.
        CorruptFile: the file is truncated, or holds more than its header says.
        TooLarge: more voxels than `config.max_voxels`.
        InconsistentGeometry: sheared or oblique axes, or qform and sform that contradict each other.
    """
    path = Path(path)
    hu, affine = _load(path, config)
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    axes, flips, oriented = orient(affine, shape, place=path)
    # File names of public collections carry patient numbers, so not even they are kept.
    pseudonym = f"patient-{hashlib.sha256(hu.data).hexdigest()[:16]}"
    valid = (hu >= PADDING_HU) & (hu < np.inf)
    lowest = float(np.min(hu, where=valid, initial=np.inf))
    highest = float(np.max(hu, where=valid, initial=-np.inf))
    if not lowest < SOFTEST_AIR_HU or highest > HIGHEST_HU:
        extreme = f"lowest value is {lowest:g}, air is -1000" if highest <= HIGHEST_HU else f"highest is {highest:g}"
        raise errors.WrongFormat(
            path, f"not Hounsfield units (the {extreme})", "give the original CT, not a windowed picture"
        )
    hu[~valid] = AIR_HU
    source = ScanSource(
        format="nifti", pseudonym=pseudonym, shape=shape, affine=as_rows(affine), axes=axes, flips=flips
    )
    return Scan(
        np.ascontiguousarray(to_patient_axes(hu, axes, flips)),
        np.ascontiguousarray(to_patient_axes(valid, axes, flips)),
        oriented,
        source,
    )


def read_nifti_mask(
    path: Path, *, like: Scan, threshold: float = 0.5, config: ReaderConfig | None = None
) -> np.ndarray:
    """Read a mask as bool (z, y, x) on the grid of `like`: true where the stored value is >= threshold.

    Raises:
        InconsistentGeometry: the mask's grid differs from the scan's by more than a tenth of a voxel.
        WrongFormat, CorruptFile, TooLarge: as for `read_nifti`.
    """
    path = Path(path)
    values, affine = _load(path, config)
    shape = (values.shape[0], values.shape[1], values.shape[2])
    axes, flips, oriented = orient(affine, shape, place=path)
    mask = to_patient_axes(values, axes, flips)
    if mask.shape != like.hu.shape:
        raise errors.InconsistentGeometry(
            path, f"mask of shape {mask.shape} for a scan of {like.hu.shape}", "give the mask of this scan"
        )
    corners = np.array([[k, j, i, 1] for k in (0, 1) for j in (0, 1) for i in (0, 1)]) * np.array(
        [*(np.array(mask.shape) - 1), 1]
    )
    offset = float(np.abs((oriented - like.affine) @ corners.T).max())
    if offset > 0.1 * min(like.spacing_mm):
        raise errors.InconsistentGeometry(
            path, f"the mask lies up to {offset:.2f} mm beside its scan", "resample it to the scan's grid"
        )
    return np.ascontiguousarray(mask >= threshold)


def _load(path: Path, config: ReaderConfig | None) -> tuple[np.ndarray, np.ndarray]:
    """The array as (k, j, i) float32, and its (4, 4) array-order affine in LPS mm."""
    values, affine = load_nifti(path, max_voxels=(config or ReaderConfig()).max_voxels)
    return values, RAS_TO_LPS @ affine @ REVERSE
