"""Predictions in the scan's own geometry: NIfTI masks or probabilities, and an overlay picture to look at."""

import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capsfl.ct.errors import StorageError
from capsfl.ct.nifti import RAS_TO_LPS, REVERSE
from capsfl.ct.normalize import window
from capsfl.ct.scan import Scan

PLANES = ("axial", "coronal", "sagittal")
POSITIONS = (0.3, 0.5, 0.7)
NOTICE = "not for clinical use"
"""Stands in every file that shows or carries a prediction."""


def write_nifti_mask(path: Path, mask_or_probability: np.ndarray, scan: Scan) -> None:
    """Write a mask (uint8) or a probability (float32) as NIfTI in the series' own array order and affine.

    Args:
        path: ends in .nii or .nii.gz.
        mask_or_probability: (z, y, x) bool or real array on the scan's grid.
        scan: the scan it belongs to.

    Raises:
        ValueError: the shape is not the scan's, or the name is not NIfTI's.
        StorageError: the place is read-only or full; nothing half-written is left.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: not a NIfTI name; end it in .nii or .nii.gz")
    check_shape(mask_or_probability, scan)
    series = scan.source.to_series(np.asarray(mask_or_probability))
    stored = series.astype(np.uint8 if series.dtype == bool else np.float32)
    affine = RAS_TO_LPS @ np.array(scan.source.affine) @ REVERSE
    image = nibabel.Nifti1Image(stored.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"capsfl: {NOTICE}"
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    write_atomically(path, lambda partial: nibabel.save(image, partial))


def write_overlay_png(
    path: Path, scan: Scan, mask: np.ndarray, *, title: str = "", field: np.ndarray | None = None
) -> None:
    """Draw three axial, coronal and sagittal slices in the lung window with the mask's outline.

    The slices cut the mask where it holds anything, else the scan, at 30, 50 and 70 %. Radiological
    convention: the patient's right is on the left, and where the left side is front it says A.

    Args:
        path: a .png file.
        scan: the scan.
        mask: (z, y, x) bool on the scan's grid.
        title: what the picture shows, in a few words.
        field: low and high corner (2, 3) in voxels of the part that was looked at; its border is drawn, dashed, where
            it lies within the scan.

    Raises:
        ValueError: the shape is not the scan's, or the name does not end in .png.
        StorageError: the place is read-only or full; nothing half-written is left.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path}: not a PNG name; end it in .png")
    check_shape(mask, scan)
    mask = np.asarray(mask, bool)
    gray = window(scan.hu)
    figure = Figure(figsize=(9, 9), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3)
    for row, plane in enumerate(PLANES):
        for column, index in enumerate(_slices(mask, row)):
            # Superior is up in coronal and sagittal pictures, so z runs against the rows.
            picture, outline = np.take(gray, index, axis=row), np.take(mask, index, axis=row)
            if row > 0:
                picture, outline = picture[::-1], outline[::-1]
            vertical, horizontal = [mm for axis, mm in enumerate(scan.spacing_mm) if axis != row]
            panel = axes[row, column]
            panel.imshow(picture, cmap="gray", vmin=-0.5, vmax=0.5, aspect=vertical / horizontal)
            if field is not None:
                _draw_field(panel, np.delete(field, row, axis=1), picture.shape, upright=row > 0)
            if outline.any():
                panel.contour(outline.astype(np.float32), levels=[0.5], colors="#ff5050", linewidths=0.8)
            panel.set_title(f"{plane} {index + 1}/{scan.hu.shape[row]}", color="white", fontsize=9)
            side = "A" if plane == "sagittal" else "R"
            panel.text(0.02, 0.5, side, color="white", fontsize=9, transform=panel.transAxes, va="center")
            panel.set_axis_off()
    figure.suptitle(f"{title} · {NOTICE}" if title else NOTICE, color="white", fontsize=10)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))


def _draw_field(panel: Axes, corners: np.ndarray, shape: tuple[int, ...], *, upright: bool) -> None:
    """Draw the lines of a field's border (low, high along rows and columns) that lie within a picture."""
    rows, columns = corners.T
    if upright:
        rows = shape[0] - 1 - rows[::-1]
    style = {"color": "#ffd24d", "linewidth": 0.9, "linestyle": (0, (5, 4))}
    for row in rows[(rows > 0) & (rows < shape[0] - 1)]:
        panel.plot(np.clip(columns, 0, shape[1] - 1), (row, row), **style)
    for column in columns[(columns > 0) & (columns < shape[1] - 1)]:
        panel.plot((column, column), np.clip(rows, 0, shape[0] - 1), **style)


def _slices(mask: np.ndarray, axis: int) -> list[int]:
    others = tuple(other for other in range(3) if other != axis)
    used = np.flatnonzero(mask.any(axis=others))
    low, high = (int(used[0]), int(used[-1])) if used.size else (0, mask.shape[axis] - 1)
    return [round(low + position * (high - low)) for position in POSITIONS]


def check_shape(values: np.ndarray, scan: Scan) -> None:
    """Raises ValueError where values are not on the scan's grid."""
    if values.shape != scan.hu.shape:
        raise ValueError(
            f"mask: shape {values.shape}, the scan has {scan.hu.shape}; "
            "bring it to the scan's grid with to_scan_space first"
        )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the place and rename; the suffixes stay, because writers choose the format by them.

    Raises:
        StorageError: the place is read-only or full; nothing half-written is left.
    """
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose a writable folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
