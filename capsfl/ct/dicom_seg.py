"""A mask as DICOM SEG on the slices of the series it was made from (PS3.3 A.51), written by highdicom."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from scipy import ndimage

from capsfl.ct.errors import ScanError
from capsfl.ct.export import NOTICE, check_shape, write_atomically
from capsfl.ct.headers import quiet_pydicom
from capsfl.ct.scan import Scan
from capsfl.ct.slices import DicomSlice

IMAGE = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
MULTIFRAME = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
EQUIPMENT = ("Manufacturer", "ManufacturerModelName")
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
IDENTITY = (*PATIENT, *STUDY, "IssuerOfPatientID", "StudyDescription", "SpecificCharacterSet")
"""What makes a SEG belong to its patient in an archive; written only where it is asked for."""

DEIDENTIFIED = "capsfl: patient and study left out, UIDs kept"

TARGETS = {
    "lesion": ("52988006", "Lesion", "abnormal"),
    "nodule": ("27925004", "Nodule", "abnormal"),
    "tumour": ("108369006", "Neoplasm", "abnormal"),
    "tumor": ("108369006", "Neoplasm", "abnormal"),
    "lung": ("39607008", "Lung", "anatomical"),
    "lungs": ("39607008", "Lung", "anatomical"),
}
"""SNOMED CT codes of what is commonly marked; another target gets a private code, which keeps its words."""
CATEGORIES = {
    "abnormal": ("49755003", "SCT", "Morphologically Abnormal Structure"),
    "anatomical": ("91723000", "SCT", "Anatomical Structure"),
    "other": ("85756007", "SCT", "Tissue"),
}


class MissingHighdicom(ValueError):
    """The extra that writes SEG is not installed; the message is the command that installs it."""


class SegError(ScanError):
    """A mask that cannot be written as DICOM SEG on this series."""


@dataclass(frozen=True)
class Algorithm:
    """Who made a mask.

    Attributes:
        name: of the network, such as "capsfl segcaps".
        version: of the program.
        parameters: what else is needed to make the mask again, such as digests; `key=value` in the SEG.
        serial: at most 64 characters that name the trained model, its digest.
    """

    name: str
    version: str
    serial: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def require_highdicom() -> Any:
    """Returns highdicom.

    Raises:
        MissingHighdicom: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module("highdicom")
    except ModuleNotFoundError as error:
        raise MissingHighdicom("seg: writing DICOM SEG needs highdicom; pip install 'capsfl[seg]'") from error


def write_dicom_seg(
    path: Path,
    mask: np.ndarray,
    scan: Scan,
    slices: Sequence[DicomSlice],
    *,
    target: str,
    algorithm: Algorithm,
    identified: bool = False,
) -> None:
    """Write a mask as a binary SEG whose frames lie on the source slices and reference them.

    Frames without a marked pixel are left out, unless all are. The scan's voxels are the slices' pixels; where it was
    sheared straight, the mask is moved back within each slice, and where a missing slice was interpolated, there is
    none to carry the mask.

    By default the file names nobody: the patient is the scan's pseudonym, study date, numbers and names are empty.
    The UIDs of study, series and slices stay, without which a SEG lies nowhere: whoever holds the scan can join the
    two. With `identified` the patient's and the study's identity are copied from the scan, as an archive needs them to
    file the SEG beside it; such a file is as confidential as the scan.

    Args:
        path: a .dcm file.
        mask: (z, y, x) bool on the scan's grid.
        scan: the scan.
        slices: those it was read from, in any order.
        target: what is marked, in words.
        algorithm: who marked it.
        identified: whether to copy the patient's identity.

    Raises:
        ValueError: the shape is not the scan's, or the name does not end in .dcm.
        SegError: the slices are not the scan's, or lack what a SEG has to refer to.
        MissingHighdicom: highdicom is not installed.
        StorageError: the place is read-only or full; nothing half-written is left.
    """
    path = Path(path)
    if path.suffix != ".dcm":
        raise ValueError(f"{path}: not a DICOM name; end it in .dcm")
    check_shape(mask, scan)
    highdicom = require_highdicom()
    if not slices:
        raise SegError(path, "a NIfTI scan has no slices for a SEG to lie on", "write NIfTI instead")
    placed = _place(scan, slices)
    frames = scan.source.to_series(np.asarray(mask, bool))
    with quiet_pydicom():
        if placed[0][1].frame is None:
            sources = [_source(s.path, scan, identified) for _, s, _ in placed]
            pixels = np.stack([_on_slice(frames[k], s, offset) for k, s, offset in placed])
        else:
            sources = [_source(placed[0][1].path, scan, identified)]
            pixels = np.zeros((int(sources[0].NumberOfFrames), *_size(placed[0][1])), np.uint8)
            for k, s, offset in placed:
                pixels[s.frame] = _on_slice(frames[k], s, offset)
        _check_sources(sources, placed[0][1])
        try:
            seg = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=pixels,
                segmentation_type="BINARY",
                segment_descriptions=[_segment(highdicom, target, algorithm)],
                series_instance_uid=highdicom.UID(),
                series_number=1000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="capsfl",
                manufacturer_model_name=algorithm.name,
                software_versions=algorithm.version,
                device_serial_number=algorithm.serial,
                series_description=f"{target[:40]} {NOTICE}",
                content_description=f"{target[:40]} {NOTICE}",
                content_label="CAPSFL",
                omit_empty_frames=bool(pixels.any()),
            )
        except (ValueError, AttributeError, TypeError) as error:
            raise SegError(
                placed[0][1].path, f"no SEG can refer to it ({str(error).splitlines()[0][:120]})", "write NIfTI instead"
            ) from error
        if not identified:
            seg.PatientIdentityRemoved, seg.DeidentificationMethod = "YES", DEIDENTIFIED
        write_atomically(path, lambda partial: seg.save_as(partial))


def _place(scan: Scan, slices: Sequence[DicomSlice]) -> list[tuple[int, DicomSlice, np.ndarray]]:
    """Finds for every plane of the series' array its slice, and how far the reader sheared it, in rows and columns.

    Voxels of an unsheared scan are the pixels of its slices, however their positions are rounded; of a tilted one the
    reader moved every slice along the line from the first to the last (`Stack.offset`), and by that it is moved back.
    """
    affine = np.array(scan.source.affine)
    to_index = np.linalg.inv(affine)
    placed: dict[int, tuple[int, DicomSlice, np.ndarray]] = {}
    for candidate in slices:
        plane, row, column = (to_index @ [*candidate.position, 1.0])[:3]
        nearest = round(float(plane))
        if abs(plane - nearest) < 0.25 and 0 <= nearest < scan.source.shape[0]:
            # Of two equal slices in one place, either will do.
            placed.setdefault(nearest, (nearest, candidate, np.array([row, column])))
    files = {candidate.path for _, candidate, _ in placed.values()}
    place = slices[0].path.parent
    if not placed:
        raise SegError(place, "none of its slices lies in the scan", "give the slices that the scan was read from")
    if any(candidate.frame is not None for _, candidate, _ in placed.values()) and len(files) > 1:
        raise SegError(place, "its frames are spread over several files", "write NIfTI instead")
    planes = sorted(placed)
    if not scan.source.corrected_tilt_degrees:
        return [(plane, placed[plane][1], np.zeros(2)) for plane in planes]
    ends = planes[0], planes[-1]
    rows, columns = (np.interp(planes, ends, [placed[end][2][axis] for end in ends]) for axis in (0, 1))
    return [(plane, placed[plane][1], np.array(offset)) for plane, *offset in zip(planes, rows, columns, strict=True)]


def _on_slice(frame: np.ndarray, candidate: DicomSlice, offset: np.ndarray) -> np.ndarray:
    """The mask at the pixels of a slice, which may lie shifted within its plane."""
    size = _size(candidate)
    if frame.shape == size and not offset.any():
        return frame.astype(np.uint8)
    shifted: Any = offset
    moved = ndimage.affine_transform(frame.astype(np.float32), np.ones(2), shifted, output_shape=size, order=1)
    return (moved >= 0.5).astype(np.uint8)


def _size(candidate: DicomSlice) -> tuple[int, int]:
    return candidate.rows, candidate.columns


def _source(path: Path, scan: Scan, identified: bool) -> Dataset:
    """What highdicom needs to know of a source file, and of its patient only what may stand in the SEG."""
    geometry = ("Rows", "Columns", "PixelSpacing", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient")
    wanted = [*IMAGE, *MULTIFRAME, *LOSSY, *EQUIPMENT, *geometry, "PositionReferenceIndicator"]
    header = pydicom.dcmread(
        path, stop_before_pixels=True, force=True, specific_tags=[*wanted, *(IDENTITY if identified else ())]
    )
    source = Dataset()
    for keyword in (*wanted, *(IDENTITY if identified else ())):
        if header.get(keyword) is not None:
            source[keyword] = header[keyword]
    source.Modality = "CT"
    for keyword in (*PATIENT, *STUDY):
        if keyword not in source:
            setattr(source, keyword, "")
    if not identified:
        source.PatientID = source.PatientName = scan.source.pseudonym
    return source


def _check_sources(sources: Sequence[Dataset], first: DicomSlice) -> None:
    for keyword in IMAGE:
        if any(not source.get(keyword) for source in sources):
            raise SegError(first.path, f"no {keyword}, to which a SEG refers", "write NIfTI, or export it again")
    for source in sources[1:]:
        # The reader has found them equal within its tolerance; highdicom compares digits.
        for keyword in ("ImageOrientationPatient", "PixelSpacing"):
            if keyword in sources[0]:
                source[keyword] = sources[0][keyword]


def _segment(highdicom: Any, target: str, algorithm: Algorithm) -> Any:
    code = highdicom.sr.CodedConcept
    value, meaning, category = TARGETS.get(target.strip().lower(), ("", target[:64], "other"))
    kind = code(value, "SCT", meaning) if value else code("TARGET", "99CAPSFL", meaning)
    return highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=target[:64],
        segmented_property_category=code(*CATEGORIES[category]),
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm.name,
            version=algorithm.version,
            family=code("123110", "DCM", "Artificial Intelligence"),
            source="capsfl",
            parameters=dict(algorithm.parameters),
        ),
    )
