"""Scans with masks to compare segmentation networks on: lungs in whole volumes, tumours in patches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from capsfl.ct.lungs import body_mask
from capsfl.ct.nifti import read_nifti, read_nifti_mask
from capsfl.ct.normalize import LUNG_WINDOW
from capsfl.learning.patients import Patient
from capsfl.learning.segmentation import SegmentationConfig, cut_patches

TaskName: TypeAlias = Literal["lungs", "tumours"]

MASK = "-msk"
"""What the name of a lung mask adds to that of its volume."""
MASK_THRESHOLD = 127.5
"""The lung masks were resampled as 0 to 255 and ring."""
PATCHES = ("val_patches.h5", "test_patches.h5")
"""Tumour patches to train on and to score on; no patient is in both."""
HELD_SHARE = 4
"""One tumour patch in so many, the last ones, is held back from the choice of a step size."""
PATCH_SPACING_MM = 2.0
"""The tumour patches were cut from volumes of this isotropic spacing."""


class SegmenterDataError(ValueError):
    """Files that are absent or of another kind; the message names the file and the remedy."""


@dataclass(frozen=True)
class Fold:
    """What networks are trained on, and the cases that they are scored on.

    Attributes:
        name: tells it from other folds.
        train: the cases that the pool was cut from; controls are fitted to them.
        test: cases never trained on; of several, each is one slice.
        pool: training patches, `image` `(patches, side, side, 1)` in [-0.5, 0.5], `truth` `(patches, side, side)` and
            `plane` `(patches,)`.
        held: how many patches at the end of the pool the choice of a step size trains without and is made on.
    """

    name: str
    train: tuple[Patient, ...]
    test: tuple[Patient, ...]
    pool: dict[str, np.ndarray]
    held: int = 0

    @property
    def trial(self) -> "Fold":
        """The fold to try step sizes on: trained without the patches held back."""
        return replace(self, pool={name: values[: -self.held] for name, values in self.pool.items()}, held=0)

    @property
    def held_back(self) -> dict[str, np.ndarray]:
        """The patches held back, as `pool`."""
        return {name: values[-self.held :] for name, values in self.pool.items()}


def read_lungs(folder: Path) -> tuple[Patient, ...]:
    """Reads every `NAME.nii.gz` of a folder with its mask `NAME-msk.nii.gz`.

    Raises:
        SegmenterDataError: fewer than two pairs, sides that are not divisible by 8, or sizes that differ.
        ScanError: a file is no CT volume, or no mask of its volume.
    """
    masks = sorted(folder.glob(f"*{MASK}.nii.gz"))
    if len(masks) < 2:
        raise SegmenterDataError(
            f"{folder}: {len(masks)} volumes with masks; leaving one out takes two or more NAME.nii.gz with "
            f"NAME{MASK}.nii.gz"
        )
    patients = []
    for mask in masks:
        path = mask.with_name(mask.name.replace(f"{MASK}.nii", ".nii"))
        scan = read_nifti(path)
        if any(size % 8 for size in scan.hu.shape):
            raise SegmenterDataError(f"{path}: shape {scan.hu.shape}; resample it to sides divisible by 8")
        if patients and scan.hu.shape != patients[0].hu.shape:
            raise SegmenterDataError(
                f"{path}: shape {scan.hu.shape}, {patients[0].name} has {patients[0].hu.shape}; resample them alike"
            )
        truth = read_nifti_mask(mask, like=scan, threshold=MASK_THRESHOLD)
        name = path.name.removesuffix(".nii.gz")
        body = body_mask(scan.hu, scan.spacing_mm)
        patients.append(Patient(name, "lungs", "", None, scan.hu, body, truth, scan.spacing_mm))
    return tuple(patients)


def leave_one_out(patients: tuple[Patient, ...], config: SegmentationConfig, *, seed: int) -> tuple[Fold, ...]:
    """Returns a fold per patient, trained on patches of all others."""
    cut = [cut_patches(patient, config, seed=seed + number) for number, patient in enumerate(patients)]
    folds = []
    for left, patient in enumerate(patients):
        kept = [number for number in range(len(patients)) if number != left]
        pool = {name: np.concatenate([cut[number][name] for number in kept]) for name in cut[0]}
        # The last volume is held back whole, or half of its patches where there is no other.
        held = len(cut[kept[-1]]["truth"]) // (1 if len(kept) > 1 else 2)
        train = tuple(patients[number] for number in kept)
        folds.append(Fold(f"without {patient.name}", train, (patient,), pool, held))
    return tuple(folds)


def read_tumours(folder: Path) -> Fold:
    """Reads `val_patches.h5` to train on and `test_patches.h5` to score on.

    Their intensities in [0, 1] come without the window that they went through, so they are taken for ours: what the
    patients hold as HU are intensities, and no measurement.

    Raises:
        SegmenterDataError: a file is absent, unreadable or of another kind; or h5py is missing.
    """
    train, test = (_read_patches(folder / name) for name in PATCHES)
    if len(train) < HELD_SHARE:
        raise SegmenterDataError(f"{folder / PATCHES[0]}: {len(train)} patches; training takes {HELD_SHARE} or more")
    images = np.concatenate([patient.hu for patient in train])
    level, width = LUNG_WINDOW
    truths = np.stack([patient.truth[0] for patient in train if patient.truth is not None])
    pool = {
        "image": ((images - level) / width).clip(-0.5, 0.5)[..., None].astype(np.float32),
        "truth": truths.astype(np.float32),
        "plane": np.zeros(len(train), np.int32),
    }
    # Neighbours in the file show the same tumours, so what is held back lies together.
    return Fold("tumours", train, test, pool, len(train) // HELD_SHARE)


def _read_patches(path: Path) -> tuple[Patient, ...]:
    try:
        import h5py
    except ImportError as error:
        raise SegmenterDataError(f"{path}: needs h5py; pip install 'capsfl[keras]'") from error
    try:
        with h5py.File(path) as file:
            images, labels = (_read_array(path, file, name) for name in ("images", "labels"))
    except OSError as error:
        reason = "no such file" if not path.exists() else "not a readable HDF5 file"
        raise SegmenterDataError(f"{path}: {reason}; give the folder of {' and '.join(PATCHES)}") from error
    if images.shape != labels.shape or any(size % 8 for size in images.shape[1:]):
        raise SegmenterDataError(
            f"{path}: images {images.shape}, labels {labels.shape}; expected equal shapes with sides divisible by 8"
        )
    if not (images.min() >= 0 and images.max() <= 1 and np.isin(labels, (0, 1)).all()):
        raise SegmenterDataError(f"{path}: expected images in [0, 1] and labels of 0 and 1")
    level, width = LUNG_WINDOW
    hu = ((images - 0.5) * width + level).astype(np.float32)
    spacing = (PATCH_SPACING_MM, PATCH_SPACING_MM, PATCH_SPACING_MM)
    return tuple(
        Patient(f"{path.stem} {number}", "tumours", "", None, patch, np.ones(patch.shape, bool), truth, spacing)
        for number, (patch, truth) in enumerate(zip(hu[:, None], labels[:, None] > 0, strict=True))
    )


def _read_array(path: Path, file: Any, name: str) -> np.ndarray:
    """An array `(patches, 1, side, side)` as `(patches, side, side)`."""
    array: np.ndarray = np.asarray(file[name]) if name in file else np.empty(0)
    if array.ndim != 4 or array.shape[1] != 1 or not len(array) or array.dtype.kind not in "fiu":
        raise SegmenterDataError(f"{path}: {name} of shape {array.shape}; expected (patches, 1, height, width) numbers")
    return array[:, 0]
