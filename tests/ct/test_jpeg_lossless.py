"""JPEG Lossless by the fast decoder gives GDCM's integers, and damage is refused before a decoder believes it."""

from pathlib import Path

import dicom_edits as e
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLossless, JPEGLosslessSV1

from capsfl.ct import pixels
from capsfl.ct.dicom import read_dicom
from capsfl.ct.errors import CorruptFile
from capsfl.ct.jpeg_lossless import decode_lossless, only_frame

imagecodecs = pytest.importorskip("imagecodecs", reason="no imagecodecs; pip install 'capsfl[dicom]'")
START_OF_FRAME = b"\xff\xc3"
GAP = b"\xfe\xff\x00\xe0"


def lossless(bits: int, syntax: str = JPEGLosslessSV1, change=lambda stream: stream) -> e.Edit:
    """Compresses the pixels of a slice, which are positive, as that many bits."""

    def edit(index: int, dataset: pydicom.Dataset) -> None:
        values = dataset.pixel_array.astype(np.uint16)
        stream = imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=bits)
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        dataset.PixelRepresentation = int(bits == 16)
        dataset.file_meta.TransferSyntaxUID = syntax  # pyright: ignore[reportAttributeAccessIssue]
        dataset.PixelData = encapsulate([change(stream)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True

    return edit


def changed(at: int, value: int):
    """Writes a byte of the frame's header, counted from its marker."""

    def change(stream: bytes) -> bytes:
        place = stream.index(START_OF_FRAME) + at
        return stream[:place] + bytes([value]) + stream[place + 1 :]

    return change


@pytest.fixture
def fast(monkeypatch) -> list[int]:
    """Notes how many slices the fast decoder gives; `pydicom` must not decode any."""
    counted = []

    def decode(frame: bytes) -> np.ndarray | None:
        stored = decode_lossless(frame)
        counted.append(stored is not None)
        return stored

    monkeypatch.setattr(pixels, "decode_lossless", decode)
    return counted


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
def test_both_decoders_give_the_pixels_that_were_encoded(tmp_path, fast, monkeypatch, bits, syntax):
    for name, edit in (("bare", lambda index, dataset: None), ("jpeg", lossless(bits, syntax))):
        (tmp_path / name).mkdir()
        e.stack(edit, count=4)(tmp_path / name)
    expected = read_dicom(tmp_path / "bare").hu
    np.testing.assert_array_equal(read_dicom(tmp_path / "jpeg").hu, expected)
    assert fast == [True] * 4
    monkeypatch.setattr(pixels, "_jpeg", lambda *_: None)
    np.testing.assert_array_equal(read_dicom(tmp_path / "jpeg").hu, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(4, 37), "of 1 samples of 37 bits"),  # GDCM ends the process at either
        (changed(9, 3), "of 3 samples of 16 bits"),
        (changed(6, 0), "compressed pixels of 0x128"),
        (lambda stream: stream[: len(stream) // 2], "do not decode"),
        (lambda stream: stream[:40] + stream[60:], "do not decode"),
    ],
)
@pytest.mark.parametrize("decoder", ["fast", "pydicom's"])
def test_a_damaged_stream_is_refused_by_name(tmp_path, monkeypatch, change, message, decoder):
    if decoder != "fast":
        monkeypatch.setattr(pixels, "_jpeg", lambda *_: None)
    e.stack(lossless(16, change=change), count=4)(tmp_path)
    with pytest.raises(CorruptFile, match=message) as caught:
        read_dicom(tmp_path)
    assert str(caught.value).isprintable()


def test_fragments_under_a_type_that_has_none_are_pydicoms(tmp_path, fast):
    as_text = e.rewrite("2.dcm", lambda content: content.replace(b"\xe0\x7f\x10\x00OB", b"\xe0\x7f\x10\x00SQ"))
    e.stack(lossless(16), count=4, after=as_text)(tmp_path)
    with pytest.raises(CorruptFile, match=r"2\.dcm"):
        read_dicom(tmp_path)


def test_only_whole_fragments_make_a_frame():
    table, end = GAP + bytes(4), b"\xfe\xff\xdd\xe0" + bytes(4)
    halves = [GAP + (2).to_bytes(4, "little") + part for part in (b"ab", b"cd")]
    whole = b"in front" + table + halves[0] + halves[1] + end
    assert only_frame(whole, 8) == b"abcd"
    assert only_frame(whole + b"behind", 8) == b"abcd"
    for cut in range(9, len(whole)):
        assert only_frame(whole[:cut], 8) is None
    assert only_frame(whole.replace(halves[1], b"\0" * 10), 8) is None
    assert only_frame(GAP + (8).to_bytes(4, "little") + bytes(8) + halves[0] + end, 0) is None  # a table of two frames


def test_real_slices_are_decoded_as_gdcm_does(shared_data, tmp_path, fast, monkeypatch):
    for path in sorted(Path(shared_data / "ricord1a-covid-ct-jpegll").iterdir())[20:26]:
        (tmp_path / path.name).symlink_to(path)
    one = read_dicom(tmp_path)
    assert fast == [True] * 6
    monkeypatch.setattr(pixels, "_jpeg", lambda *_: None)
    other = read_dicom(tmp_path)
    np.testing.assert_array_equal(one.hu, other.hu)
    np.testing.assert_array_equal(one.valid, other.valid)
