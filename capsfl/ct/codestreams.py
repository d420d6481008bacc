"""What picture a compressed stream declares, read before any decoder allocates or believes it."""

from typing import NamedTuple

START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
"""JPEG markers that carry the size: ISO/IEC 10918-1 table B.1, and 0xF7 of JPEG-LS (ISO/IEC 14495-1)."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
J2K_START = b"\xff\x4f\xff\x51"
"""Start of a JPEG 2000 codestream and of its size segment (ISO/IEC 15444-1, A.5.1)."""
JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "


class Picture(NamedTuple):
    """What the start of a compressed stream says of its picture."""

    rows: int
    columns: int
    bits: int | None = None
    """Of a sample; None where they are not looked at."""
    components: int | None = None
    """Samples a pixel; None where they are not looked at."""


def declared_picture(stream: bytes) -> Picture | None:
    """What a JPEG, JPEG-LS or JPEG 2000 stream declares; None where it declares nothing."""
    if stream.startswith(JP2_SIGNATURE):
        # The boxes of a .jp2 file, which the standard forbids here and writers emit: the codestream is inside.
        stream = stream[max(stream.find(J2K_START), 0) :]
    if stream.startswith(J2K_START):
        return _in_j2k(stream)
    return _in_jpeg(stream) if stream.startswith(b"\xff\xd8") else None


def _in_j2k(stream: bytes) -> Picture | None:
    if len(stream) < 24:
        return None
    right, bottom, left, top = (int.from_bytes(stream[at : at + 4], "big") for at in (8, 12, 16, 20))
    return Picture(bottom - top, right - left)


def _in_jpeg(stream: bytes) -> Picture | None:
    at = 2
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in START_OF_FRAME:
            rows, columns = (int.from_bytes(stream[at + 5 + 2 * axis : at + 7 + 2 * axis], "big") for axis in (0, 1))
            return Picture(rows, columns, stream[at + 4], stream[at + 9])
        elif marker in WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None
