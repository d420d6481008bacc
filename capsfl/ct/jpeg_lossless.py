"""JPEG Lossless by libjpeg-turbo, which takes a fifth of GDCM's time and outlives streams at which GDCM does not.

It comes with imagecodecs, of the extra `dicom`. Without it, and for whatever is not one whole stream, the decoders
that pydicom knows are asked as ever.
"""

import functools
from collections.abc import Callable
from struct import Struct
from struct import error as StructError

import numpy as np

ITEM, SEQUENCE_END = 0xE000FFFE, 0xE0DDFFFE
"""Tags as little-endian integers."""
END_OF_IMAGE = b"\xff\xd9"
item_at = Struct("<II").unpack_from


def only_frame(content: bytes, at: int) -> bytes | None:
    """The stream within the fragments (PS3.5, A.4) from a place on; None where they are not whole, or not of one frame.

    Args:
        content: bytes of a file.
        at: where the first item begins, the basic offset table.
    """
    parts: list[bytes] = []
    try:
        while True:
            tag, length = item_at(content, at)
            at += 8
            if tag == SEQUENCE_END:
                break
            if tag != ITEM or at + length > len(content):
                return None
            parts.append(content[at : at + length])
            at += length
    except StructError:
        return None
    if not parts or parts[0] not in (b"", bytes(4)):
        return None
    return b"".join(parts[1:])


def decode_lossless(frame: bytes) -> np.ndarray | None:
    """Decode a stream of one component to its (rows, columns) unsigned integers; None where that is not possible here.

    Raises:
        RuntimeError: the stream is damaged.
    """
    decoder = _decoder()
    # libjpeg makes up what a stream without its end has lost; behind the end writers pad by one byte, of any value.
    if decoder is None or END_OF_IMAGE not in frame.rstrip(b"\0")[-3:]:
        return None
    stored = decoder(frame)
    return stored if stored.dtype == np.uint16 and stored.ndim == 2 else None


@functools.cache
def _decoder() -> Callable[[bytes], np.ndarray] | None:
    try:
        from imagecodecs import JPEG8, jpeg8_decode
    except ImportError:
        return None
    return jpeg8_decode if JPEG8.available else None
