"""Stored volumes: round trip, the Zarr 3 layout other readers expect, atomicity, damage."""

import contextlib
import json
import resource
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from old_volumes import as_format

from capsfl.ct import zarr_group
from capsfl.ct.errors import CorruptVolume, StorageError
from capsfl.ct.normalize import StandardVolume
from capsfl.ct.scan import ScanSource, as_rows
from capsfl.ct.volumes import read_attributes, read_volume, write_volume
from capsfl.ct.zarr_group import brief_checksum

AFFINE = np.array([[0, 0, 2.609375, -170.1], [0, 2.609375, 0, -160.7], [4, 0, 0, -12.3], [0, 0, 0, 1]])
SOURCE = ScanSource(
    "dicom", "patient-1", (30, 64, 64), as_rows(AFFINE), (0, 1, 2), (True, False, False), manufacturer="ACME"
)


def make_volume(hu, masks=None):
    hu = np.asarray(hu, np.int16)
    return StandardVolume(
        hu=hu,
        valid=hu > -1000,
        masks=masks or {},
        affine=AFFINE,
        source_affine=AFFINE / 3,
        source_shape=(30, 64, 64),
        source=SOURCE,
        cropped_lung_fraction=0.25,
    )


def random_volume(side=32, seed=0):
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1024, 3072, (side, side, side))
    return make_volume(hu, {"lesion": rng.random(hu.shape) > 0.7, "lungs": rng.random(hu.shape) > 0.5})


@contextlib.contextmanager
def disk_of(limit_bytes: int):
    """Files may not grow over a limit, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hnp.arrays(
        np.int16,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
        elements=st.integers(-1024, 3071),
    ),
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8) | st.none(), max_size=3),
)
def test_a_volume_returns_as_it_was(tmp_path, hu, attributes):
    attributes.pop("checksum", None)
    volume = make_volume(hu, {"lesion": hu > 0})
    write_volume(tmp_path / "a.zarr", volume, attributes=attributes)
    back, kept = read_volume(tmp_path / "a.zarr")
    checksum = kept.pop("checksum")
    assert kept == attributes
    assert checksum.startswith("sha256:")
    np.testing.assert_array_equal(back.hu, hu)
    np.testing.assert_array_equal(back.valid, volume.valid)
    np.testing.assert_array_equal(back.masks["lesion"], hu > 0)
    assert back.hu.dtype == np.int16
    assert back.masks["lesion"].dtype == bool
    np.testing.assert_array_equal(back.affine, volume.affine)
    np.testing.assert_array_equal(back.source_affine, volume.source_affine)
    assert (back.source, back.source_shape) == (volume.source, volume.source_shape)
    assert back.cropped_lung_fraction == 0.25


def test_the_layout_is_zarr_3_as_specified(tmp_path):
    write_volume(tmp_path / "a.zarr", random_volume(), attributes={})
    for group in (".", "masks"):
        record = json.loads((tmp_path / "a.zarr" / group / "zarr.json").read_text())
        assert (record["zarr_format"], record["node_type"]) == (3, "group")
    types = {"hu": "int16", "valid": "bool", "masks/lesion": "uint8", "masks/lungs": "uint8"}
    for name, kind in types.items():
        record = json.loads((tmp_path / "a.zarr" / name / "zarr.json").read_text())
        assert (record["zarr_format"], record["node_type"]) == (3, "array")
        assert (record["data_type"], record["shape"]) == (kind, [32, 32, 32])
        (sharding,) = record["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
        assert record["dimension_names"] == ["z", "y", "x"]
        assert [path.name for path in (tmp_path / "a.zarr" / name / "c" / "0" / "0").iterdir()] == ["0"]
    shard = (tmp_path / "a.zarr" / "hu" / "c" / "0" / "0" / "0").read_bytes()
    # The index ends the shard: where each block begins and how long it is; then four bytes of CRC.
    start, length = struct.unpack("<QQ", shard[-20:-4])
    assert (start, length + 20) == (0, len(shard))
    # A Blosc header: uncompressed size at byte 4, compressed size at byte 12; then four bytes of CRC.
    uncompressed, _, compressed = struct.unpack("<III", shard[4:16])
    assert (uncompressed, compressed + 4) == (2 * 32**3, length)


def test_equal_volumes_have_equal_checksums_and_others_do_not(tmp_path):
    sums = []
    for name, volume in (("a", random_volume()), ("b", random_volume()), ("c", random_volume(seed=1))):
        write_volume(tmp_path / f"{name}.zarr", volume, attributes={"name": name})
        sums.append(read_attributes(tmp_path / f"{name}.zarr")["checksum"])
    assert sums[0] == sums[1] != sums[2]


SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, max_side=4)
NUMBERS = st.integers(0, 1) | st.integers(0, 3)
ARRAYS = hnp.arrays(st.sampled_from([np.int16, np.uint8]), SHAPES, elements=NUMBERS) | hnp.arrays(bool, SHAPES)


@settings(max_examples=150, deadline=None)
@given(ARRAYS, ARRAYS, st.data())
def test_the_brief_checksum_tells_all_arrays_apart_however_they_lie_in_memory(one, other, data):
    if data.draw(st.booleans()):  # one voxel apart, or none
        other = one.copy()
        place = tuple(data.draw(st.integers(0, size - 1)) for size in one.shape)
        other[place] = data.draw(st.integers(0, 3))
    same = one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    assert (brief_checksum({"a": one}) == brief_checksum({"a": other})) == same
    assert brief_checksum({"a": np.asfortranarray(one)}) == brief_checksum({"a": one})
    assert brief_checksum({"b": one}) != brief_checksum({"a": one})


def test_the_brief_checksum_hashes_neither_air_at_the_ends_nor_eight_bits_for_one(monkeypatch):
    hashed = []

    class Counting:
        def update(self, part):
            hashed.append(len(part) if isinstance(part, bytes) else part.nbytes)

        def hexdigest(self):
            return ""

    monkeypatch.setattr(zarr_group.hashlib, "sha256", Counting)
    hu = np.full((64, 16, 16), -1000, np.int16)
    hu[20:30, 3, 4] = 7
    brief_checksum({"hu": hu, "mask": hu == 7})
    assert 10 * 16 * 16 * (2 + 1 / 8) <= sum(hashed) < 10 * 16 * 16 * (2 + 1 / 8) + 300


def test_a_volume_with_the_checksum_of_format_3_reads_as_it_did(tmp_path):
    volume = random_volume()
    write_volume(tmp_path / "a.zarr", volume, attributes={"label": 0})
    as_format(tmp_path / "a.zarr", 3, volume)
    back, attributes = read_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(back.hu, volume.hu)
    assert attributes["label"] == 0
    volume.hu[0, 0, 0] ^= 1
    as_format(tmp_path / "a.zarr", 3, volume)
    with pytest.raises(CorruptVolume, match="checksum"):
        read_volume(tmp_path / "a.zarr")


def test_replacing_leaves_the_new_volume_and_nothing_else(tmp_path):
    write_volume(tmp_path / "a.zarr", random_volume(), attributes={"round": 1})
    write_volume(tmp_path / "a.zarr", make_volume(np.zeros((8, 8, 8))), attributes={"round": 2})
    volume, attributes = read_volume(tmp_path / "a.zarr")
    assert attributes["round"] == 2
    assert volume.hu.shape == (8, 8, 8)
    assert not volume.masks
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_full_disk_leaves_the_old_volume_or_none(tmp_path):
    place = tmp_path / "hospital" / "a.zarr"
    with disk_of(20_000), pytest.raises(StorageError, match=r"a\.zarr: cannot be written") as caught:
        write_volume(place, random_volume(), attributes={})
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "hospital").iterdir()) == []
    write_volume(place, make_volume(np.zeros((8, 8, 8))), attributes={})
    with disk_of(20_000), pytest.raises(StorageError):
        write_volume(place, random_volume(), attributes={})
    assert (read_volume(place)[0].hu == 0).all()
    assert [path.name for path in (tmp_path / "hospital").iterdir()] == ["a.zarr"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/a\.zarr: cannot be written .*; free space or choose"):
        write_volume(tmp_path / "file" / "a.zarr", random_volume(), attributes={})


def test_every_damaged_chunk_is_noticed(tmp_path):
    write_volume(tmp_path / "a.zarr", random_volume(), attributes={})
    for name in ("hu", "valid", "masks/lesion"):
        chunk = tmp_path / "a.zarr" / name / "c" / "0" / "0" / "0"
        content = chunk.read_bytes()
        for position in (20, len(content) // 2, len(content) - 1):
            chunk.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(CorruptVolume, match=r"a\.zarr"):
                read_volume(tmp_path / "a.zarr")
        chunk.unlink()  # Zarr takes an absent chunk for one full of the fill value
        with pytest.raises(CorruptVolume, match="checksum"):
            read_volume(tmp_path / "a.zarr")
        chunk.write_bytes(content)
    read_volume(tmp_path / "a.zarr")


def test_what_is_no_volume_of_this_format_is_refused(tmp_path):
    with pytest.raises(CorruptVolume, match="not a stored volume"):
        read_volume(tmp_path / "absent.zarr")
    write_volume(tmp_path / "a.zarr", random_volume(), attributes={})
    group = tmp_path / "a.zarr" / "zarr.json"
    group.write_text(group.read_text().replace('"version": 4', '"version": 5'))
    with pytest.raises(CorruptVolume, match="capsfl-volume 5, not capsfl-volume 4; ingest the scan again"):
        read_attributes(tmp_path / "a.zarr")
    group.write_text("{}")
    with pytest.raises(CorruptVolume, match="not a stored volume"):
        read_volume(tmp_path / "a.zarr")


def test_names_that_would_leave_the_group_are_refused(tmp_path):
    volume = make_volume(np.zeros((4, 4, 4)), {"../x": np.zeros((4, 4, 4), bool)})
    with pytest.raises(ValueError, match=r"masks\.\.\./x"):
        write_volume(tmp_path / "a.zarr", volume, attributes={})
    with pytest.raises(ValueError, match=r"attributes\.checksum"):
        write_volume(tmp_path / "a.zarr", random_volume(), attributes={"checksum": "mine"})
    assert list(tmp_path.iterdir()) == []
