"""One standard volume from any scan: extent, centre, resampling, intensity window, and the way back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from capsfl.ct.errors import ScanError, printable
from capsfl.ct.lungs import find_lungs, lung_box, lung_mask
from capsfl.ct.resample import apply_weights, covered, resample_hu, resample_mask, weight_matrix
from capsfl.ct.scan import AIR_HU, Scan, ScanSource
from capsfl.settings import Settings

__all__ = [
    "EXTENT_MM",
    "LUNG_WINDOW",
    "PRESETS",
    "SCANNER_WINDOWS",
    "StandardVolume",
    "VolumeConfig",
    "lung_box",
    "lung_mask",
    "scanner_window",
    "standardize",
    "to_scan_space",
    "window",
]

EXTENT_MM = (512.0, 334.0, 334.0)
"""Physical size (z, y, x) of the standard volume (Zhou et al., IEEE TMI 2020: 334x334x512 mm)."""

PRESETS = {"tiny": 128, "half": 256, "full": 512}
"""Voxels along each side; divisible by 8, so that the networks' poolings fit, and equal for three planes."""

HU_RANGE = (-1024.0, 3071.0)
"""The 12 bits that every scanner has; the clip also removes Lanczos overshoot at metal and air."""

SCANNER_WINDOWS = {
    "A1": (-600.0, 1200.0),
    "A2": (-600.0, 1200.0),
    "B3": (-600.0, 1600.0),
    "B4": (-600.0, 1600.0),
    "C5": (-600.0, 1600.0),
    "C6": (-500.0, 1500.0),
}
"""Window level and width in HU of the paper's scanners (its Table II)."""

SCANNER_MODELS = {
    "SOMATOM Scope": "A1",
    "SOMATOM Definition Edge": "A2",
    "Brilliance 16": "B3",
    "Brilliance iCT": "C5",
    "16-slice": "C6",
}
"""Models of Table II, by words that a scanner's name in DICOM holds; B4 and C5 are one model with one window. Of C6 the
table says no more than that, so that a GE scanner has to be named by hand."""

LUNG_WINDOW = (-600.0, 1600.0)
"""Window level and width in HU for all scanners, unless each is to have its own."""


class VolumeConfig(Settings):
    """How scans become standard volumes."""

    preset: Literal["tiny", "half", "full"] = "tiny"
    """Voxels along each side: tiny 128, half 256, full 512 (the paper's)."""

    window: Literal["fixed", "scanner"] = "fixed"
    """Intensity window: fixed is -600/1600 HU for all, scanner is the paper's Table II per scanner, which
    puts a scanner signature back into the intensities."""

    center: Literal["volume", "lungs"] = "lungs"
    """What the 512 x 334 x 334 mm are centred on; without visible lungs the volume's centre serves."""

    @property
    def side(self) -> int:
        """Voxels along each side."""
        return PRESETS[self.preset]


@dataclass(frozen=True, eq=False)
class StandardVolume:
    """A scan resampled to the standard grid, with what is needed to carry predictions back."""

    hu: np.ndarray
    """(z, y, x) int16 HU in [-1024, 3071]."""
    valid: np.ndarray
    """(z, y, x) bool, False outside the scan and where the scanner padded."""
    masks: Mapping[str, np.ndarray]
    """Named (z, y, x) bool masks on the same grid."""
    affine: np.ndarray
    """(4, 4) array-order index (k, j, i, 1) to LPS mm."""
    source_affine: np.ndarray
    """(4, 4) affine of the scan's grid."""
    source_shape: tuple[int, int, int]
    """Shape (z, y, x) of the scan's grid."""
    source: ScanSource
    cropped_lung_fraction: float = field(default=0.0)
    """Share of the lungs' volume that the extent cut off; 0 when all of it fits or no lung was found."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel distances along (z, y, x)."""
        z, y, x = (float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x


def standardize(scan: Scan, *, config: VolumeConfig, masks: Mapping[str, np.ndarray] | None = None) -> StandardVolume:
    """Resample a scan once, Lanczos a = 3 antialiased, to the preset's grid; -1000 HU outside.

    The volume keeps the scan's directions (a patient who lies askew stays askew), so one pass per axis
    suffices and the affine tells the truth. Masks are resampled linearly and cut at 0.5.

    Args:
        scan: the scan in patient axes.
        config: preset and centring.
        masks: named arrays (z, y, x) on the scan's grid.

    Raises:
        ValueError: a mask does not have the scan's shape.
    """
    masks = dict(masks or {})
    for name, mask in masks.items():
        if mask.shape != scan.hu.shape:
            raise ValueError(f"masks.{name}: shape {mask.shape}, the scan has {scan.hu.shape}; resample it to the scan")
    side = config.side
    shape = np.array(scan.hu.shape)
    spacing = np.array(scan.spacing_mm)
    steps = np.array(EXTENT_MM) / side / spacing
    center, cropped = (shape - 1) / 2, 0.0
    lungs = find_lungs(scan.hu, scan.spacing_mm)
    if lungs is not None:
        if config.center == "lungs":
            low, high = lungs.box()
            center = (low + high - 1) / 2
        half = np.array(EXTENT_MM) / spacing / 2
        cropped = lungs.fraction_outside(center + 0.5 - half, center + 0.5 + half)
    starts = center - steps * (side - 1) / 2

    def weights(kernel: Literal["lanczos", "linear"]) -> list[np.ndarray]:
        return [
            weight_matrix(int(shape[axis]), side, step=steps[axis], start=starts[axis], kernel=kernel)
            for axis in range(3)
        ]

    smooth, linear = weights("lanczos"), weights("linear")
    if scan.valid.all():
        valid = np.zeros((side, side, side), bool)
        z, y, x = (covered(matrix) for matrix in linear)
        valid[z, y, x] = True
    else:
        valid = resample_mask(scan.valid, linear)

    affine = scan.affine.copy()
    affine[:3, :3] *= steps[None, :]
    affine[:3, 3] += scan.affine[:3, :3] @ starts
    return StandardVolume(
        hu=resample_hu(scan.hu, smooth, limits=HU_RANGE, outside=AIR_HU),
        valid=valid,
        masks={name: resample_mask(mask, linear) for name, mask in masks.items()},
        affine=affine,
        source_affine=scan.affine.copy(),
        source_shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        source=scan.source,
        cropped_lung_fraction=cropped,
    )


def to_scan_space(
    values: np.ndarray,
    volume_affine: np.ndarray,
    scan_affine: np.ndarray,
    scan_shape: tuple[int, int, int],
) -> np.ndarray:
    """Resample a map on the standard grid linearly back to the scan's grid; 0 where the volume ends.

    Args:
        values: (z, y, x) map, for instance a probability or a mask.
        volume_affine: (4, 4) affine of the map.
        scan_affine: (4, 4) affine of the scan.
        scan_shape: shape (z, y, x) of the scan.

    Returns:
        float32 array of shape `scan_shape`.

    Raises:
        ValueError: the two grids do not share their directions, so the volume is not this scan's.
    """
    # Index in the volume = relative @ index in the scan.
    relative = np.linalg.inv(volume_affine) @ scan_affine
    steps = np.diag(relative)[:3]
    off_axis = relative[:3, :3] - np.diag(steps)
    if np.any(steps <= 0) or np.abs(off_axis @ np.diag(scan_shape)).max() > 0.5:
        raise ValueError("volume_affine: its directions differ from the scan's; give the scan it came from")
    return apply_weights(
        values,
        [
            weight_matrix(
                values.shape[axis],
                scan_shape[axis],
                step=float(steps[axis]),
                start=float(relative[axis, 3]),
                kernel="linear",
            )
            for axis in range(3)
        ],
    )


def window(hu: np.ndarray, level: float = LUNG_WINDOW[0], width: float = LUNG_WINDOW[1]) -> np.ndarray:
    """Map HU to [-0.5, 0.5]: (HU - level) / width, clipped (the paper's Eq 1); NumPy or jax arrays.

    Args:
        hu: array in HU of any shape; the result is float32.
        level: centre of the window in HU.
        width: width of the window in HU.

    Raises:
        ValueError: the width is not positive; one that jax traces is not looked at.
    """
    if isinstance(width, int | float) and width <= 0:
        raise ValueError(f"width: {width} HU; a window needs a positive width")
    return ((hu.astype(np.float32) - level) / width).clip(-0.5, 0.5)


def scanner_window(config: VolumeConfig, scanner: str | None) -> tuple[float, float]:
    """Window level and width in HU for a scan of the named scanner under the configured rule.

    Args:
        config: the rule.
        scanner: an id of Table II, or a name that holds one of its models, as DICOM tags do.

    Raises:
        ScanError: the rule is `scanner` and Table II does not know it.
    """
    if config.window == "fixed":
        return LUNG_WINDOW
    named = (scanner or "").casefold()
    models = (number for model, number in SCANNER_MODELS.items() if model.casefold() in named)
    number = scanner if scanner in SCANNER_WINDOWS else next(models, None)
    if number is None:
        raise ScanError(
            f"scanner {printable(scanner)}" if scanner else "no scanner named",
            'Table II has no window for it, which data.volumes.window = "scanner" needs',
            f'name one of {", ".join(SCANNER_WINDOWS)} as the scanner, or train with window = "fixed"',
        )
    return SCANNER_WINDOWS[number]
