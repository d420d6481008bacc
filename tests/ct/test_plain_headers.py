"""A header that counts as plain gives what pydicom makes of the whole file; every other one is pydicom's."""

import io
import random
import warnings
from collections import Counter
from pathlib import Path

import dicom_edits as e
import dicom_mutations as mutations
import pydicom
import pytest

from capsfl.ct.headers import READ_TAGS, WANTED, quiet_pydicom
from capsfl.ct.plain_headers import WINDOW_BYTES, Memo, read_plain

HEAD_BYTES = 12_000


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> dict[str, bytes]:
    """One file of each kind of series that the mutations damage; of the pixels their first bytes."""
    found = {}
    for name, write in mutations.BASES.items():
        folder = tmp_path_factory.mktemp("base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(folder)
        found[name] = min(folder.iterdir()).read_bytes()
    return found


def compare(content: bytes, memo: Memo) -> str:
    """Whether a header was taken for plain; an AssertionError where pydicom makes something else of it."""
    plain = read_plain(content[:WINDOW_BYTES], WANTED, memo)
    if plain is None:
        return "pydicom's"
    stream = io.BytesIO(content)
    whole = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(READ_TAGS))
    expected = {int(tag): whole[tag].value for tag in READ_TAGS if tag in whole}
    assert plain.values.keys() == expected.keys()
    for tag, value in expected.items():
        assert type(plain.values[tag]) is type(value)
        assert repr(plain.values[tag]) == repr(value)  # "nan" does not equal itself
    assert plain.syntax == whole.file_meta.get("TransferSyntaxUID")
    assert plain.sop_class == whole.file_meta.get("MediaStorageSOPClassUID")
    assert (plain.implicit, True) == whole.original_encoding
    assert plain.end == stream.tell()
    return "plain"


def same_as_pydicom(contents) -> Counter:
    """Compares all, which share what was converted as the files of one call do."""
    memo: Memo = {}
    with quiet_pydicom():
        return Counter(compare(content, memo) for content in contents)


def test_slices_of_every_encoding_are_plain_and_odd_ones_are_not(small_files):
    memo: Memo = {}
    with quiet_pydicom():
        verdicts = {name: compare(content, memo) for name, content in small_files.items()}
    odd = {"deflated", "enhanced", "enhanced RLE"}
    assert verdicts == {name: "pydicom's" if name in odd else "plain" for name in small_files}


def test_what_is_converted_once_serves_all_slices(small_files):
    memo: Memo = {}
    read_plain(small_files["explicit"][:WINDOW_BYTES], WANTED, memo)
    before = dict(memo)
    assert len(before) > 20
    assert read_plain(small_files["explicit"][:WINDOW_BYTES], WANTED, memo) is not None
    assert memo == before


def test_damaged_headers_are_taken_as_pydicom_takes_them(small_files):
    damaged = []
    for number, name in enumerate(("explicit", "implicit", "RLE")):
        content = small_files[name][:HEAD_BYTES]
        seeds = range(200 * number, 200 * number + 200)
        damaged += [mutations.damage_header(random.Random(seed), content) for seed in seeds]
    verdicts = same_as_pydicom(damaged)
    assert min(verdicts.values()) > 100, verdicts


def test_a_header_cut_anywhere_is_never_plain(small_files):
    content = small_files["explicit"]
    plain = read_plain(content[:WINDOW_BYTES], WANTED, {})
    assert plain is not None
    for end in range(0, plain.end + 8, 37):
        assert read_plain(content[:end], WANTED, {}) is None


def sequence(*parts: bytes) -> bytes:
    """A private sequence without a length, as it stands in an explicit header."""
    return b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"".join(parts) + b"\xfe\xff\xdd\xe0\0\0\0\0"


ITEM, ITEM_END = b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\0\0\0\0"
ELEMENT = b"\x09\x00\x11\x10LO\x04\x00abcd"


@pytest.mark.parametrize(
    ("inserted", "verdict"),
    [
        (sequence(), "plain"),
        (sequence(ITEM, ITEM_END), "plain"),
        (sequence(ITEM, ELEMENT, ITEM_END, ITEM, ELEMENT, ELEMENT, ITEM_END), "plain"),
        (sequence(b"\xfe\xff\x00\xe0\x0c\0\0\0", ELEMENT), "plain"),
        (sequence(ITEM, sequence(ITEM, ELEMENT, ITEM_END), ITEM_END), "plain"),
        (sequence(b"\xfe\xff\x00\xe0\x0b\0\0\0", ELEMENT), "pydicom's"),  # the item ends within its element
        (sequence(ITEM, b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 144", ITEM_END), "pydicom's"),
        (sequence(ITEM, b"\x09\x00\x11\x10??\x04\x00abcd", ITEM_END), "pydicom's"),
        (sequence(ELEMENT), "pydicom's"),
        (b"\x09\x00\x11\x10UN\0\0\xff\xff\xff\xff" + b"\xfe\xff\xdd\xe0\0\0\0\0", "pydicom's"),
        (ELEMENT + ELEMENT, "pydicom's"),
    ],
)
def test_sequences_are_stepped_over_only_where_pydicom_ends_at_the_same_byte(small_files, inserted, verdict):
    content = small_files["explicit"]
    at = content.index(b"\x10\x00\x10\x00PN", 300)  # the patient's name, the first element behind group 9
    start = content.index(b"\x09\x00", 300)
    assert start < at
    assert same_as_pydicom([content[:start] + inserted + content[at:]]) == {verdict: 1}


def test_texts_beyond_ascii_are_pydicoms(small_files):
    content = small_files["explicit"]
    maker = content.replace(b"GE MEDICAL SYSTEMS", b"G\xc9 MEDICAL SYSTEMS", 1)
    assert maker != content
    assert same_as_pydicom([maker]) == {"pydicom's": 1}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_all_of_pydicoms_own_files_agree():
    paths = [path for path in (e.PYDICOM / "test_files").rglob("*") if path.is_file()]
    verdicts = same_as_pydicom(path.read_bytes() for path in paths if path.stat().st_size < 4 << 20)
    assert verdicts["plain"] > 50


@pytest.mark.parametrize("folder", ["lung-pet-ct-dx-siemens", "ricord1a-covid-ct-jpegll", "ge-tilt-variable"])
def test_slices_of_real_scanners_are_plain(shared_data, folder):
    paths = sorted(Path(shared_data / folder).iterdir())
    assert same_as_pydicom(path.read_bytes()[: WINDOW_BYTES + 16] for path in paths) == {"plain": len(paths)}
