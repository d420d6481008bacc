"""Volumes wherever they lie: object stores, URLs, slabs, killed writers, the format before, a plain Zarr reader."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore
from old_volumes import as_format

from capsfl.ct import output, zarr_group
from capsfl.ct.errors import CorruptVolume, StorageError
from capsfl.ct.normalize import StandardVolume
from capsfl.ct.output import create_object
from capsfl.ct.scan import ScanSource, as_rows
from capsfl.ct.volumes import read_attributes, read_slab, read_volume, write_volume

AFFINE = np.array([[0, 0, 2.5, -170.1], [0, 2.5, 0, -160.7], [4, 0, 0, -12.3], [0, 0, 0, 1]])
SOURCE = ScanSource("dicom", "patient-1", (30, 64, 64), as_rows(AFFINE), (0, 1, 2), (True, False, False))


def volume_of(side: int, *, seed: int = 0, masks: tuple[str, ...] = ("lesion",)) -> StandardVolume:
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1024, 3072, (side, side, side)).astype(np.int16)
    drawn = {name: rng.random(hu.shape) > 0.6 for name in masks}
    return StandardVolume(hu, hu > -900, drawn, AFFINE, AFFINE / 3, (30, 64, 64), SOURCE)


def assert_same(one: StandardVolume, other: StandardVolume) -> None:
    np.testing.assert_array_equal(one.hu, other.hu)
    np.testing.assert_array_equal(one.valid, other.valid)
    assert one.masks.keys() == other.masks.keys()
    for name in one.masks:
        np.testing.assert_array_equal(one.masks[name], other.masks[name])
    np.testing.assert_array_equal(one.affine, other.affine)


def keys(url: str) -> set[str]:
    return {key.decode() for key in zarr_group.open_store(url).list().result()}


def prefix_of(url: str) -> str:
    return json.loads(zarr_group.open_store(url)["zarr.json"])["attributes"]["capsfl"]["prefix"]


def test_an_object_store_holds_a_volume_like_a_folder_does(tmp_path):
    url = "memory://bucket/hospital%20A/50%25.zarr"
    write_volume(url, volume_of(20), attributes={"label": 1})
    write_volume(tmp_path / "a.zarr", volume_of(20), attributes={"label": 1})
    stored, attributes = read_volume(url)
    assert_same(stored, volume_of(20))
    assert attributes == read_volume(tmp_path / "a.zarr")[1] == read_attributes(url)
    folder, prefix = tmp_path / "a.zarr", prefix_of(url)
    stored_in_folder = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert keys(url) == {"zarr.json", *(f"{prefix}/{key}" for key in stored_in_folder)}
    np.testing.assert_array_equal(read_slab(url, axis="y", start=3, stop=5), stored.hu[:, 3:5])


def test_a_file_url_is_the_folder_it_names(tmp_path):
    write_volume(f"file://{tmp_path}/two%20words/a.zarr", volume_of(8), attributes={})
    assert_same(read_volume(tmp_path / "two words" / "a.zarr")[0], volume_of(8))
    write_volume(str(tmp_path / "two words" / "b.zarr"), volume_of(8), attributes={})
    assert [path.name for path in sorted((tmp_path / "two words").iterdir())] == ["a.zarr", "b.zarr"]


@pytest.mark.parametrize("url", ["ftp://host/a.zarr", "s3://", "file://elsewhere/a.zarr"])
def test_a_url_of_another_kind_is_refused_naming_those_that_are_not(url):
    with pytest.raises(ValueError, match=r"no place for volumes; give a folder, .* file://, gs://, memory://, s3://"):
        write_volume(url, volume_of(4), attributes={})


def failing(monkeypatch: pytest.MonkeyPatch, what: BaseException) -> pytest.MonkeyPatch:
    """Writers that fail at their second array."""
    write = zarr_group._write_array

    def fail(root, name, array):
        if name == "valid":
            raise what
        return write(root, name, array)

    monkeypatch.setattr(zarr_group, "_write_array", fail)
    return monkeypatch


def test_in_an_object_store_the_old_volume_stands_until_the_new_one_is_whole(monkeypatch):
    url, old = "memory://bucket/order.zarr", volume_of(8, masks=("lesion", "lungs"))
    write_volume(url, old, attributes={"round": 1})
    seen = []
    write = zarr_group._write_array

    def watched(root, name, array):
        seen.append(name)
        assert_same(read_volume(url)[0], old)
        return write(root, name, array)

    monkeypatch.setattr(zarr_group, "_write_array", watched)
    write_volume(url, volume_of(8, seed=1), attributes={"round": 2})
    assert seen == ["hu", "valid", "masks/lesion"]
    assert {key.partition("/")[0] for key in keys(url)} == {"zarr.json", prefix_of(url)}, "the old one is gone"
    assert not any("lungs" in key for key in keys(url))
    assert read_attributes(url)["round"] == 2


def test_a_store_that_fails_midway_keeps_what_it_held_and_says_why_in_a_line(monkeypatch):
    url, fault = "memory://bucket/failing.zarr", ValueError("PERMISSION_DENIED: while writing\nwith details")
    failing(monkeypatch, fault)
    with pytest.raises(StorageError, match=r"failing\.zarr: cannot be written \(PERMISSION_DENIED.*access") as caught:
        write_volume(url, volume_of(8), attributes={})
    assert "\n" not in str(caught.value)
    assert keys(url) == set()
    with pytest.raises(CorruptVolume, match="not a stored volume"):
        read_volume(url)
    monkeypatch.undo()
    write_volume(url, volume_of(8), attributes={})
    there = keys(url)
    failing(monkeypatch, fault)
    with pytest.raises(StorageError):
        write_volume(url, volume_of(8, seed=1), attributes={})
    assert_same(read_volume(url)[0], volume_of(8))
    assert keys(url) == there


def test_a_marker_that_moved_without_saying_so_keeps_its_arrays(monkeypatch):
    url = "memory://bucket/silent.zarr"
    write_volume(url, volume_of(8), attributes={})
    store = zarr_group.open_store(url)

    class Silent:
        """A store whose answer to the conditional write is lost."""

        def __getattr__(self, name):
            return getattr(store, name)

        def __add__(self, suffix):
            return store + suffix

        def write(self, key, value, **condition):
            store.write(key, value, **condition).result()
            if condition:
                raise ValueError("UNAVAILABLE: connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(zarr_group, "open_store", lambda place: Silent())
        with pytest.raises(StorageError, match="UNAVAILABLE"):
            write_volume(url, volume_of(8, seed=1), attributes={})
    assert_same(read_volume(url)[0], volume_of(8, seed=1))


def test_what_a_killed_writer_left_in_a_store_goes_with_the_next_volume():
    url = "memory://bucket/killed.zarr"
    zarr_group.open_store(url).write("0123456789abcdef/hu/c/0/0/0", b"half").result()
    write_volume(url, volume_of(8), attributes={})
    assert not any(key.startswith("0123456789abcdef") for key in keys(url))
    assert_same(read_volume(url)[0], volume_of(8))


def test_of_two_writers_at_one_time_the_first_to_end_wins(monkeypatch):
    url = "memory://bucket/two.zarr"
    write_volume(url, volume_of(8), attributes={})
    write, faster = zarr_group._write_array, []

    def interrupted(root, name, array):
        if not faster:
            faster.append(True)
            write_volume(url, volume_of(8, seed=1), attributes={"by": "faster"})
        return write(root, name, array)

    monkeypatch.setattr(zarr_group, "_write_array", interrupted)
    with pytest.raises(
        StorageError, match=r"two\.zarr: another process wrote it meanwhile; run the same command again"
    ):
        write_volume(url, volume_of(8, seed=2), attributes={"by": "slower"})
    assert_same(read_volume(url)[0], volume_of(8, seed=1))
    assert {key.partition("/")[0] for key in keys(url)} == {"zarr.json", prefix_of(url)}


def test_a_reader_whose_volume_is_replaced_meanwhile_reads_the_new_one(monkeypatch):
    url = "memory://bucket/replaced.zarr"
    write_volume(url, volume_of(8), attributes={"round": 1})
    opened, replaced = zarr_group._open, []

    def late(root, name, **options):
        if not replaced:
            replaced.append(True)
            write_volume(url, volume_of(8, seed=1), attributes={"round": 2})
        return opened(root, name, **options)

    monkeypatch.setattr(zarr_group, "_open", late)
    volume, attributes = read_volume(url)
    assert_same(volume, volume_of(8, seed=1))
    assert attributes["round"] == 2
    replaced.clear()
    np.testing.assert_array_equal(read_slab(url, axis="z", start=2, stop=4), volume_of(8, seed=1).hu[2:4])


def test_all_processes_see_one_salt(monkeypatch):
    """The second one looks when there is none yet, and writes when there is one."""
    place = "memory://bucket/salted/.salt"
    store = zarr_group.open_store("memory://bucket/salted")
    missing = store.read(".salt").result()
    assert create_object(place, b"first") == b"first"
    late = iter([missing])

    class Late:
        def read(self, key):
            found = next(late, None)
            return SimpleNamespace(result=lambda: found) if found is not None else store.read(key)

        def write(self, *arguments, **options):
            return store.write(*arguments, **options)

    monkeypatch.setattr(output, "_object", lambda place: (Late(), ".salt"))
    assert create_object(place, b"second") == b"first"


@pytest.mark.parametrize("url", [False, True])
def test_planes_of_air_are_told_from_planes_that_were_lost(tmp_path, url):
    place = "memory://bucket/air.zarr" if url else tmp_path / "a.zarr"
    air = StandardVolume(
        np.full((40, 40, 40), -1000, np.int16), np.zeros((40, 40, 40), bool), {}, AFFINE, AFFINE, (30, 64, 64), SOURCE
    )
    write_volume(place, air, attributes={})
    assert (read_slab(place, axis="z", start=0, stop=2) == -1000).all()
    root = zarr_group.open_store(place)
    (shard,) = (key for key in root.list().result() if key.endswith(b"hu/c/0/0/0"))
    root.write(shard, None).result()
    with pytest.raises(CorruptVolume, match=r"unreadable \(NOT_FOUND.*delete it and ingest"):
        read_slab(place, axis="z", start=0, stop=2)
    assert not read_slab(place, axis="z", start=0, stop=2, array="valid").any()


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_planes_of_every_direction_are_read_without_the_rest(tmp_path, axis):
    volume = volume_of(130)
    write_volume(tmp_path / "a.zarr", volume, attributes={})
    number = "zyx".index(axis)
    for name, values in (("hu", volume.hu), ("valid", volume.valid), ("masks/lesion", volume.masks["lesion"])):
        slab = read_slab(tmp_path / "a.zarr", axis=axis, start=60, stop=67, array=name)
        np.testing.assert_array_equal(slab, np.take(values, range(60, 67), axis=number))
    # Damage the first block: planes beside it do not notice, planes through it do, by its own CRC.
    shard = tmp_path / "a.zarr" / "hu" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    blocks = np.frombuffer(content[-(125 * 16 + 4) : -4], "<u8").reshape(125, 2)
    content[int(blocks[0, 0]) + 100] ^= 1
    shard.write_bytes(content)
    kept = read_slab(tmp_path / "a.zarr", axis=axis, start=32, stop=130)
    np.testing.assert_array_equal(kept, np.take(volume.hu, range(32, 130), axis=number))
    with pytest.raises(CorruptVolume, match="delete it and ingest"):
        read_slab(tmp_path / "a.zarr", axis=axis, start=0, stop=1)
    with pytest.raises(CorruptVolume, match="delete it and ingest"):
        read_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (7, 9), (5, 4)])
def test_planes_outside_are_refused(tmp_path, start, stop):
    write_volume(tmp_path / "a.zarr", volume_of(8), attributes={})
    with pytest.raises(ValueError, match=rf"region: {start}:{stop} along axis 1 of 8"):
        read_slab(tmp_path / "a.zarr", axis="y", start=start, stop=stop)


def test_a_volume_of_format_1_reads_as_it_did(tmp_path):
    volume = volume_of(12)
    write_volume(tmp_path / "a.zarr", volume, attributes={"label": 0})
    for name in ("hu", "valid", "masks/lesion"):  # chunks of 5 instead of one shard
        folder = tmp_path / "a.zarr" / name
        values = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder}/"}).result().read().result()
        metadata = json.loads((folder / "zarr.json").read_text())
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [5, 5, 5]
        metadata["codecs"] = metadata["codecs"][0]["configuration"]["codecs"]
        spec = {"driver": "zarr3", "kvstore": f"file://{folder}/", "metadata": metadata}
        tensorstore.open(spec, create=True).result().write(values).result()
    as_format(tmp_path / "a.zarr", 1, volume)
    assert len(list((tmp_path / "a.zarr" / "hu" / "c").rglob("*"))) > 27
    back, attributes = read_volume(tmp_path / "a.zarr")
    assert_same(back, volume)
    assert attributes["label"] == 0


WRITER = """
import sys, numpy as np
from capsfl.ct.normalize import StandardVolume
from capsfl.ct.scan import ScanSource, as_rows
from capsfl.ct.volumes import write_volume
affine = np.diag([4.0, 2.5, 2.5, 1.0])
source = ScanSource("dicom", "patient-1", (9, 9, 9), as_rows(affine), (0, 1, 2), (True, False, False))
for number in range(1000):
    hu = np.full((100, 100, 100), number, np.int16) + np.arange(100, dtype=np.int16)
    volume = StandardVolume(hu, hu > 0, {"lesion": hu > 50}, affine, affine, (9, 9, 9), source)
    write_volume(sys.argv[1], volume, attributes={"number": number})
    print(number, flush=True)
"""


@pytest.mark.torture
def test_a_killed_writer_leaves_a_whole_volume_or_none_and_the_next_one_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    kills = 60 if "CAPSFL_TORTURE" in os.environ else 2
    place = tmp_path / "a.zarr"
    found = []
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline(), "the writer writes"
        time.sleep(rng.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        if not place.exists():  # killed between two renames
            found.append(None)
            continue
        volume, attributes = read_volume(place)
        found.append(attributes["number"])
        assert volume.hu.min() == attributes["number"]
        assert volume.hu.max() == attributes["number"] + 99
    assert any(number is not None for number in found)
    write_volume(place, volume_of(8), attributes={})
    assert_same(read_volume(place)[0], volume_of(8))


def test_a_plain_zarr_reader_reads_it(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed; pip install 'capsfl[test]'")
    volume = volume_of(70)
    write_volume(tmp_path / "a.zarr", volume, attributes={"label": 1})
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert group.attrs["capsfl"]["attributes"] == {"label": 1}
    assert group["hu"].shards == (96, 96, 96)
    assert group["hu"].chunks == (32, 32, 32)
    assert group["valid"].chunks == group["masks/lesion"].chunks == (64, 64, 64)
    np.testing.assert_array_equal(group["hu"][...], volume.hu)
    np.testing.assert_array_equal(group["valid"][5, :, 7:9], volume.valid[5, :, 7:9])
    np.testing.assert_array_equal(group["masks/lesion"][..., 69], volume.masks["lesion"][..., 69])
    assert dict(group["masks"].arrays()).keys() == {"lesion"}


def test_the_environment_names_an_s3_store_of_one_s_own_as_it_does_for_amazon_s_tools(monkeypatch):
    """Both names of the address, the narrower one first; nothing is looked up where the keys are given."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "endpoint" not in zarr_group._s3_access()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000/")
    opened = zarr_group.open_store("s3://bucket/two%20words").spec().to_json()
    assert opened["endpoint"] == "http://127.0.0.1:9000"
    assert (opened["bucket"], opened["path"], opened["aws_region"]) == ("bucket", "two words/", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9001")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    opened = zarr_group.open_store("s3://bucket").spec().to_json()
    assert (opened["endpoint"], opened["aws_region"]) == ("http://127.0.0.1:9001", "eu-central-1")
