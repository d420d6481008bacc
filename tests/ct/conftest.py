"""Synthetic DICOM series whose Hounsfield units say where each voxel lies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SECRET = "Doe^Jane^SECRET"


def position_hu(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """An asymmetric linear field in LPS mm: every flip and permutation of axes changes it."""
    return np.rint(2 * x + 3 * y - 5 * z - 600).astype(np.int64)


@pytest.fixture(scope="session")
def field() -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """HU at LPS (x, y, z) mm of the synthetic series."""
    return position_hu


@pytest.fixture(scope="session")
def write_series() -> Callable[..., list[Path]]:
    """Write a CT series and return its files, named against their order in space."""

    def write(
        folder: Path,
        *,
        shape: tuple[int, int, int] = (6, 10, 8),
        orientation: tuple[float, ...] = AXIAL,
        origin: tuple[float, float, float] = (-12.0, -9.0, 30.0),
        pixel_spacing: tuple[float, float] = (2.0, 3.0),
        step: tuple[float, float, float] | None = None,
        signed: bool = True,
        slope: float = 1.0,
        intercept: float = -1024.0,
        uid: str = "1.2.3.4",
        edit: Callable[[int, FileDataset], None] | None = None,
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        along_row, along_column = np.array(orientation[:3]), np.array(orientation[3:])
        along_slices = np.array(step) if step is not None else 5.0 * np.cross(along_row, along_column)
        slices, rows, columns = shape
        paths = []
        for index in range(slices):
            corner = np.array(origin) + index * along_slices
            row, column = np.mgrid[:rows, :columns]
            points = (
                corner[:, None, None]
                + along_row[:, None, None] * column[None] * pixel_spacing[1]
                + along_column[:, None, None] * row[None] * pixel_spacing[0]
            )
            stored = np.rint((position_hu(points[0], points[1], points[2]) - intercept) / slope)
            meta = FileMetaDataset()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            meta.MediaStorageSOPClassUID = CTImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[uid, str(index)])
            path = folder / f"{uid.replace('.', '_')}-{slices - index:03d}.dcm"
            dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
            dataset.SOPClassUID = CTImageStorage
            dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", uid
            dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
            dataset.PatientName, dataset.PatientID = SECRET, SECRET
            dataset.Manufacturer, dataset.ManufacturerModelName = "ACME", "Scan 1"
            dataset.ConvolutionKernel, dataset.SliceThickness, dataset.KVP = "B40", 99.0, 120.0
            dataset.InstanceNumber = (7 * index) % slices + 1  # says nothing about the order
            dataset.ImageOrientationPatient = list(orientation)
            dataset.ImagePositionPatient = [float(value) for value in corner]
            dataset.PixelSpacing = list(pixel_spacing)
            dataset.Rows, dataset.Columns = rows, columns
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
            dataset.PixelRepresentation = int(signed)
            dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
            dataset.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
            if edit is not None:
                edit(index, dataset)
            pydicom.dcmwrite(path, dataset, enforce_file_format=True)
            paths.append(path)
        return paths

    return write
