"""NIfTI volumes and masks to the patient's axes; NIfTI speaks RAS, everything here speaks LPS."""

import hashlib
import warnings
import zlib
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from capsfl.ct import errors
from capsfl.ct.scan import AIR_HU, PADDING_HU, Scan, ScanSource, as_rows, orient, to_patient_axes

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
REVERSE = np.eye(4)[[2, 1, 0, 3]]
"""Exchanges the index orders (i, j, k) of NIfTI and (k, j, i) of our arrays."""

SOFTEST_AIR_HU = -500.0
"""A chest CT always holds voxels below this; a picture stored as 0..255 never does."""


def read_nifti(path: Path) -> Scan:
    """Read a CT volume in Hounsfield units; padding (below -1500 HU, or not finite) becomes -1000, invalid.

    Raises:
        WrongFormat: not NIfTI, not one volume, without geometry, or not Hounsfield units.
        CorruptFile: the file is truncated.
        InconsistentGeometry: sheared or oblique axes.
    """
    path = Path(path)
    values, affine = _load(path)
    shape = (values.shape[0], values.shape[1], values.shape[2])
    finite = np.isfinite(values)
    valid = finite & (values >= PADDING_HU)
    lowest = float(values[finite].min()) if finite.any() else np.nan
    if not lowest < SOFTEST_AIR_HU:
        raise errors.WrongFormat(
            path,
            f"not Hounsfield units (the lowest value is {lowest:g}, air is -1000)",
            "give the original CT, not a windowed picture",
        )
    hu = np.where(valid, values, np.float32(AIR_HU))
    axes, flips, oriented = orient(affine, shape, place=path)
    source = ScanSource(
        format="nifti",
        # File names of public collections carry patient numbers, so not even they are kept.
        pseudonym=f"patient-{hashlib.sha256(values.tobytes()).hexdigest()[:16]}",
        shape=shape,
        affine=as_rows(affine),
        axes=axes,
        flips=flips,
    )
    return Scan(
        np.ascontiguousarray(to_patient_axes(hu, axes, flips)),
        np.ascontiguousarray(to_patient_axes(valid, axes, flips)),
        oriented,
        source,
    )


def read_nifti_mask(path: Path, *, like: Scan, threshold: float = 0.5) -> np.ndarray:
    """Read a mask as bool (z, y, x) on the grid of `like`: true where the stored value is >= threshold.

    Raises:
        InconsistentGeometry: the mask's grid differs from the scan's by more than a tenth of a voxel.
        WrongFormat, CorruptFile: as for `read_nifti`.
    """
    path = Path(path)
    values, affine = _load(path)
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


def _load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The array as (k, j, i) float32, and its (4, 4) array-order affine in LPS mm."""
    if not path.is_file():
        raise errors.WrongFormat(path, "no such file", "check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = cast(nibabel.Nifti1Image, nibabel.load(path))
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise errors.WrongFormat(path, "not a readable NIfTI file", "give a .nii or .nii.gz file") from error
    if not isinstance(image, nibabel.Nifti1Image | nibabel.Nifti1Pair):
        raise errors.WrongFormat(path, f"{type(image).__name__}, not NIfTI", "convert it to .nii.gz")
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise errors.WrongFormat(path, f"shape {shape}", "give one three-dimensional volume")
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise errors.WrongFormat(
            path, "neither sform nor qform is set, so left and right are unknown", "set the orientation"
        )
    try:
        values = np.asarray(image.dataobj, dtype=np.float32).reshape(shape[:3])
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise errors.CorruptFile(path, "the voxels cannot be read", "copy the file again") from error
    affine = RAS_TO_LPS @ np.asarray(image.affine, np.float64) @ REVERSE
    return values.transpose(2, 1, 0), affine
