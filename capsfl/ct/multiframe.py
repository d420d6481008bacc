"""Enhanced CT: many frames in one file, each described by functional groups (DICOM PS3.3 A.38.1, C.7.6.16)."""

from collections.abc import Callable
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from capsfl.ct import errors
from capsfl.ct.slices import DicomSlice, Header, make_slice, number, read_facts, several, text

ENHANCED = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "FrameType": "CTImageFrameTypeSequence",
    "StackID": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "KVP": "CTXRayDetailsSequence",
}
"""For each element that may differ between frames, the functional group that holds it."""

FUNCTIONAL = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
MOST_FRAMES = 100_000
"""More than any acquisition holds; a larger number is damage."""


def is_multiframe(header: Header) -> bool:
    """Tell whether a file holds several frames, or could."""
    return header.get("SOPClassUID") in ENHANCED or (number(header.get("NumberOfFrames")) or 1) > 1


def frame_types(header: Header) -> set[str]:
    """All values of FrameType that the frames carry, in capitals."""
    groups = [item for keyword in FUNCTIONAL for item in several(header.get(keyword))]
    return {str(kind).upper() for group in groups for kind in several(_in_group(group, "FrameType"))}


def slices_of(path: Path, header: Header) -> tuple[DicomSlice, ...]:
    """Take a multi-frame file apart into its frames, in the order in which the file holds them.

    A value comes from the frame's own group, else from the group that all frames share.

    Raises:
        UnsupportedMultiframe: not an enhanced CT, or a frame without a functional group of its own.
        ScanError: as for a single slice; the message names the frame.
    """
    remedy = "convert it to single-frame CT or to NIfTI (dcm2niix)"
    if header.get("SOPClassUID") not in ENHANCED:
        raise errors.UnsupportedMultiframe(path, "several frames in a file of a single-frame kind", remedy)
    per_frame = several(header.get("PerFrameFunctionalGroupsSequence"))
    shared = (several(header.get("SharedFunctionalGroupsSequence")) or [Dataset()])[0]
    declared = number(header.get("NumberOfFrames")) or 1
    if len(per_frame) != declared or not 1 <= declared <= MOST_FRAMES:
        raise errors.UnsupportedMultiframe(
            path, f"{declared:g} frames and {len(per_frame)} functional groups that describe them", remedy
        )
    first = _reader(header, shared, per_frame[0])
    facts = read_facts(header, first)
    slices = []
    for index, group in enumerate(per_frame):
        value = _reader(header, shared, group)
        stack = " ".join(filter(None, (text(value("StackID")), text(value("TemporalPositionIndex")))))
        try:
            slices.append(make_slice(path, index, header, value, facts=facts, stack=stack))
        except errors.ScanError as error:
            raise type(error)(path, f"frame {index + 1}: {error.fault}", error.remedy) from None
    return tuple(slices)


def _reader(header: Header, shared: Dataset, own: Dataset) -> Callable[[str], object]:
    def value(keyword: str) -> object:
        for group in (own, shared):
            found = _in_group(group, keyword)
            if found is not None:
                return found
        return header.get(keyword)  # converters of old series leave elements at the top

    return value


def _in_group(group: Dataset, keyword: str) -> object:
    items = several(group.get(GROUPS[keyword]))
    return items[0].get(keyword) if items else None
