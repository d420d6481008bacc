"""The elements that a reader wants of a plain DICOM header, found without making objects of all the others.

pydicom makes an object of every element, which costs a millisecond a slice. Here elements are stepped over by their
lengths (PS3.5, 7.1 and 7.5), and pydicom converts the wanted ones, once for all slices that share a value. Whatever is
not plain (a type that is none, elements out of order, another character set, a header that ends early) is left to
pydicom as a whole, so that it is accepted or refused as ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Any, cast

from pydicom.charset import default_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pydicom.uid import AllTransferSyntaxes, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

WINDOW_BYTES = 1 << 16
"""The headers of single slices are a few kilobytes; a larger one is pydicom's."""
PREFIX_END = 132
FIRST_OF_FILE = b"\x02\x00\x00\x00UL\x04\x00"
"""Group length, with which the file's own header begins."""
SOP_CLASS, TRANSFER_SYNTAX, CHARACTER_SET = 0x00020002, 0x00020010, 0x00080005
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED_LENGTH = 0xFFFFFFFF
DEEPEST = 16
AMBIGUOUS = (0x00280120, 0x00280121)
"""Pixel padding: without a type of its own it has that of the pixels, so that its bytes alone do not tell its value."""
ASCII_ALIKE = {b"", b"ISO_IR 6", b"ISO_IR 100", b"ISO_IR 192"}
"""Character sets in which ASCII is ASCII; a text that holds other bytes is pydicom's."""

SHORT = {str(vr).encode() for vr in EXPLICIT_VR_LENGTH_16}
LONG = {str(vr).encode() for vr in EXPLICIT_VR_LENGTH_32}
"""Types whose elements write their lengths in 16 bits, and in 32."""
NUMBERS = {"US", "SS", "US or SS", "UL", "SL", "FL", "FD"}
explicit_at, implicit_at, length_at = Struct("<HH2sH").unpack_from, Struct("<HHI").unpack_from, Struct("<I").unpack_from

Memo = dict[tuple[int, str | None, bytes], object]
"""Converted values by tag, type and bytes."""
Found = dict[int, tuple[str | None, bytes]]
"""Type (None where the encoding writes none) and bytes of elements by tag."""


@dataclass(frozen=True)
class PlainHeader:
    """What a plain header says."""

    values: dict[int, Any]
    """Converted values of the wanted elements by tag."""
    sop_class: object
    """MediaStorageSOPClassUID of the file's own header."""
    syntax: object
    """TransferSyntaxUID of the file's own header."""
    implicit: bool
    """Whether elements are written without types."""
    end: int
    """Where the pixels' element begins."""


class NotPlainError(Exception):
    """The header is pydicom's."""


def _padded(syntax: str) -> bytes:
    return syntax.encode() + b"\0" * (len(syntax) % 2)


IMPLICIT = _padded(ImplicitVRLittleEndian)
SYNTAXES = {IMPLICIT, _padded(ExplicitVRLittleEndian)} | {
    _padded(syntax) for syntax in AllTransferSyntaxes if syntax.is_encapsulated
}


def read_plain(head: bytes, wanted: Mapping[int, BaseTag], memo: Memo) -> PlainHeader | None:
    """Read the wanted elements of a header that is plain; None where it is not.

    What is returned is of the wanted what `pydicom.dcmread(path, stop_before_pixels=True)` holds.

    Args:
        head: the first `WINDOW_BYTES` of a file.
        wanted: tags by their number, neither private ones nor of the file's own header.
        memo: values that were converted before; what is converted now is added. Nobody may change them.
    """
    try:
        own, start = _file_header(head)
        implicit = own[TRANSFER_SYNTAX][1] == IMPLICIT
        found, end = (_implicit if implicit else _explicit)(head, start, wanted)
        values = {tag: _value(wanted[tag], *found[tag], memo) for tag in found}
        if ambiguous := [tag for tag in AMBIGUOUS if tag in found and found[tag][0] not in NUMBERS]:
            data = Dataset({wanted[tag]: _raw(wanted[tag], *found[tag]) for tag in found})
            data.set_original_encoding(implicit, True, default_encoding)
            values |= {tag: data[wanted[tag]].value for tag in ambiguous}
        sop_class, syntax = (
            _value(BaseTag(tag), *own[tag], memo) if tag in own else None for tag in (SOP_CLASS, TRANSFER_SYNTAX)
        )
    except Exception:  # whatever it is, pydicom meets it too and has the word
        return None
    return PlainHeader(values, sop_class, syntax, implicit, end)


def _file_header(head: bytes) -> tuple[Found, int]:
    """The kind of object and the transfer syntax, and where the data set begins."""
    if not head.startswith(FIRST_OF_FILE, PREFIX_END):
        raise NotPlainError
    found: Found = {}
    at, last = PREFIX_END, -1
    while True:
        group, number, code, length = explicit_at(head, at)
        if group != 2:
            break
        if number <= last:
            raise NotPlainError
        last = number
        length, at = _length(head, at, code, length)
        if (tag := group << 16 | number) in (SOP_CLASS, TRANSFER_SYNTAX):
            found[tag] = (code.decode(), head[at : at + length])
        at += length
    if found[TRANSFER_SYNTAX][0] != "UI" or found[TRANSFER_SYNTAX][1] not in SYNTAXES:
        raise NotPlainError
    return found, at


def _length(head: bytes, at: int, code: bytes, length: int) -> tuple[int, int]:
    """The length of an element that begins at a place, as its type writes it, and where its value begins."""
    if code in SHORT:
        return length, at + 8
    if code in LONG:
        return length_at(head, at + 8)[0], at + 12
    raise NotPlainError


def _explicit(head: bytes, at: int, wanted: Mapping[int, BaseTag]) -> tuple[Found, int]:
    """The wanted elements in front of the pixels, and where these begin."""
    found: Found = {}
    last = 0x0002FFFF
    while True:
        group, number, code, length = explicit_at(head, at)
        tag = group << 16 | number
        if tag <= last or tag > PIXELS[-1]:
            raise NotPlainError
        last, start = tag, at
        length, at = _length(head, at, code, length)
        if tag in PIXELS:
            if code not in (b"OB", b"OW"):
                raise NotPlainError
            return found, start
        if length == UNDEFINED_LENGTH:
            if code != b"SQ" or tag in wanted:
                raise NotPlainError
            at = _after_sequence(head, at, DEEPEST, implicit=False)
            continue
        if tag in wanted:
            found[tag] = (code.decode(), head[at : at + length])
        elif tag == CHARACTER_SET:
            _check_character_set(code, head[at : at + length])
        at += length


def _implicit(head: bytes, at: int, wanted: Mapping[int, BaseTag]) -> tuple[Found, int]:
    """As `_explicit`, of elements that are written without types."""
    if head[at + 4 : at + 6].isalpha():  # pydicom would take it for a type
        raise NotPlainError
    found: Found = {}
    last = 0x0002FFFF
    while True:
        group, number, length = implicit_at(head, at)
        tag = group << 16 | number
        if tag <= last or tag > PIXELS[-1]:
            raise NotPlainError
        if tag in PIXELS:
            return found, at
        last, at = tag, at + 8
        if length == UNDEFINED_LENGTH:
            if tag in wanted or not _is_sequence(head, tag, at):
                raise NotPlainError
            at = _after_sequence(head, at, DEEPEST, implicit=True)
            continue
        if tag in wanted:
            found[tag] = (None, head[at : at + length])
        elif tag == CHARACTER_SET:
            _check_character_set(b"CS", head[at : at + length])
        at += length


def _check_character_set(code: bytes, name: bytes) -> None:
    if code != b"CS" or name.rstrip(b" ") not in ASCII_ALIKE:
        raise NotPlainError


def _is_sequence(head: bytes, tag: int, at: int) -> bool:
    """Whether an element without type and length is a sequence: one by the dictionary, or private with an item."""
    if tag >> 16 & 1:
        group, number, _ = implicit_at(head, at)
        return group << 16 | number == ITEM
    return dictionary_VR(tag) == "SQ"  # a tag that no dictionary knows raises


def _after_sequence(head: bytes, at: int, depth: int, *, implicit: bool) -> int:
    """Where a sequence without a length ends; all in it has to be plain."""
    if not depth:
        raise NotPlainError
    while True:
        group, number, length = implicit_at(head, at)
        tag, at = group << 16 | number, at + 8
        if tag == SEQUENCE_END and length == 0:
            return at
        if tag != ITEM:
            raise NotPlainError
        at = _after_item(head, at, None if length == UNDEFINED_LENGTH else at + length, depth, implicit=implicit)


def _after_item(head: bytes, at: int, end: int | None, depth: int, *, implicit: bool) -> int:
    """Where an item ends: at `end`, or behind its delimiter."""
    while at != end:
        group, number, code, length = explicit_at(head, at)
        tag = group << 16 | number
        if tag == ITEM_END and end is None:
            return at + 8
        length, at = (length_at(head, at + 4)[0], at + 8) if implicit else _length(head, at, code, length)
        if length == UNDEFINED_LENGTH:
            if not (_is_sequence(head, tag, at) if implicit else code == b"SQ"):
                raise NotPlainError
            at = _after_sequence(head, at, depth - 1, implicit=implicit)
        else:
            at += length
        if tag == CHARACTER_SET or at > (len(head) if end is None else end):
            raise NotPlainError
    return at


def _value(tag: BaseTag, code: str | None, value: bytes, memo: Memo) -> object:
    """Convert a value as pydicom does, unless one with the same bytes was."""
    key = (tag, code, value)
    if key in memo:
        return memo[key]
    kind = code or dictionary_VR(tag)
    if kind == "SQ" or (kind not in NUMBERS and not (value.isascii() and b"\x1b" not in value)):
        raise NotPlainError
    if tag in AMBIGUOUS and code not in NUMBERS:
        return None  # `read_plain` converts it beside the others
    alone = Dataset({tag: _raw(tag, code, value)})
    alone.set_original_encoding(code is None, True, default_encoding)
    memo[key] = alone[tag].value
    return memo[key]


def _raw(tag: BaseTag, code: str | None, value: bytes) -> RawDataElement:
    found = value or cast(bytes | None, empty_value_for_VR(code, raw=True))
    return RawDataElement(tag, code, len(value), found, 0, code is None, True)
