"""One scan as files: a DICOM CT series and a NIfTI mask on the same grid."""

import io
import uuid
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from capsfl.ct.phantom.cohort import Subject
from capsfl.ct.phantom.scanners import Geometry, Scanner

_UID_NAMESPACE = uuid.UUID("6f1c9f0e-5f0b-5c46-9a52-0e5b8f2c7d11")
_INTERCEPT = -1024


def _uid(*parts: object) -> UID:
    """A UID under the root of UUIDs (DICOM PS3.5 B.2), the same for the same parts."""
    return UID(f"2.25.{uuid.uuid5(_UID_NAMESPACE, '/'.join(map(str, parts))).int}")


def write_series(folder: Path, hu: NDArray[np.int16], geometry: Geometry, *, subject: Subject, identity: str) -> None:
    """Write one file a slice into an existing folder, numbered from the apex down as scanners do.

    Args:
        folder: Where the files go.
        hu: Hounsfield units `(slices, rows, columns)` from the feet up.
        geometry: The voxels' place.
        subject: The patient and the scanner.
        identity: What makes the series' UIDs unique among phantoms, such as its configuration.
    """
    scanner = subject.scanner
    template = _template(hu.shape[1:], geometry, subject=subject, identity=identity)
    # Read back, the shared attributes stay encoded: every slice after this one costs a third to write.
    encoded = io.BytesIO()
    template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID = _uid(identity)
    template.save_as(encoded, enforce_file_format=True)
    encoded.seek(0)
    dataset = dcmread(encoded)
    x, y, z = geometry.origin_mm
    for number, k in enumerate(reversed(range(len(hu))), start=1):
        position = z + k * geometry.spacing_mm[0]
        instance = _uid(identity, subject.id, "instance", number)
        dataset.file_meta.MediaStorageSOPInstanceUID = instance
        dataset.SOPInstanceUID = instance
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [f"{x:.6f}", f"{y:.6f}", f"{position:.4f}"]
        dataset.SliceLocation = f"{position:.4f}"
        stored = hu[k] - np.int16(_INTERCEPT)
        dataset.add_new("PixelData", "OW", stored.astype("<i2" if scanner.signed else "<u2").tobytes())
        dataset.save_as(folder / f"IM-{number:04d}.dcm", enforce_file_format=True)


def _template(shape: tuple[int, ...], geometry: Geometry, *, subject: Subject, identity: str) -> Dataset:
    """What all slices share: the attributes the CT Image IOD requires (DICOM PS3.3 A.3) and usual ones."""
    scanner = subject.scanner
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPClassUID = CTImageStorage
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = "20200301"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "120000"
    dataset.AccessionNumber = ""
    dataset.Modality = "CT"
    dataset.Manufacturer = scanner.manufacturer
    dataset.ManufacturerModelName = scanner.model
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = "Synthetic chest CT"
    dataset.SeriesDescription = f"Chest {geometry.spacing_mm[0]:g} mm {scanner.kernel}"
    dataset.PatientName = f"PHANTOM^{subject.id}"
    dataset.PatientID = subject.id
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "O"
    dataset.BodyPartExamined = "CHEST"
    dataset.SliceThickness = f"{geometry.spacing_mm[0]:g}"
    dataset.KVP = str(scanner.kilovolts)
    dataset.ReconstructionDiameter = f"{scanner.field_of_view_mm:g}"
    dataset.ConvolutionKernel = scanner.kernel
    dataset.PatientPosition = "HFS"
    dataset.StudyInstanceUID = _uid(identity, subject.id, "study")
    dataset.SeriesInstanceUID = _uid(identity, subject.id, "series")
    dataset.FrameOfReferenceUID = _uid(identity, subject.id, "frame")
    dataset.PositionReferenceIndicator = ""
    dataset.StudyID = "1"
    dataset.SeriesNumber = "1"
    dataset.AcquisitionNumber = "1"
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = shape
    dataset.PixelSpacing = [f"{spacing:.10g}" for spacing in geometry.spacing_mm[1:]]
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16 if scanner.signed else 12
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(scanner.signed)
    dataset.QualityControlImage = "YES"  # the standard's flag for a phantom
    dataset.BurnedInAnnotation = "NO"
    _set_padding(dataset, scanner)
    dataset.WindowCenter = f"{scanner.window_level:g}"
    dataset.WindowWidth = f"{scanner.window_width:g}"
    dataset.RescaleIntercept = str(_INTERCEPT)
    dataset.RescaleSlope = "1"
    dataset.RescaleType = "HU"
    return dataset


def _set_padding(dataset: Dataset, scanner: Scanner) -> None:
    """Declare the padding, unless it is a value that real voxels take: Philips pads with air."""
    if scanner.padding_hu < scanner.minimum_hu:
        padding = scanner.padding_hu - _INTERCEPT
        dataset.add_new("PixelPaddingValue", "SS" if scanner.signed else "US", padding)


def write_mask(path: Path, mask: NDArray[np.bool_], geometry: Geometry) -> None:
    """Write a mask `(slices, rows, columns)` as a NIfTI image of bytes, its affine in RAS."""
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ geometry.affine[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(mask.transpose(2, 1, 0).astype(np.uint8), to_ras)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
