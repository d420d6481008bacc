"""Ingestion into an object store: TensorStore's own S3 driver speaks to a server on loopback."""

import threading
from pathlib import Path

import nibabel
import numpy as np
import pytest
from loopback_s3 import LoopbackS3, loopback_s3

from capsfl.ct import zarr_group
from capsfl.ct.errors import CorruptVolume, StorageError
from capsfl.ct.index import read_index
from capsfl.ct.volumes import read_attributes, read_slab, read_volume, write_volume

pytestmark = pytest.mark.journey


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    """The server, named as a user would name a store of the hospital's own."""
    with loopback_s3() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        yield server


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A manifest of two small NIfTI scans, of which each has air around a body."""
    source = tmp_path / "scans"
    source.mkdir()
    rows = ["patient,hospital,image,label"]
    for number in range(2):
        values = np.full((20, 20, 12), -1000, np.int16)
        values[4:16, 4:16] = 40 + number
        nibabel.save(nibabel.Nifti1Image(values, np.diag([-16.0, -16.0, 30.0, 1.0])), source / f"{number}.nii.gz")  # pyright: ignore[reportPrivateImportUsage]
        rows.append(f"P-{number},ward-a,{number}.nii.gz,{number}")
    (source / "manifest.csv").write_text("\n".join(rows) + "\n")
    return source


def ingested(answer) -> str:
    return answer.out.partition(":")[0].strip()


def test_scans_go_into_an_s3_store_and_come_back_as_from_a_folder(scans: Path, store: LoopbackS3, tmp_path: Path, here):
    url = "s3://bucket/study%20of%202/volumes"
    assert ingested(here("ingest", scans, url, "--processes", "1")) == "2 written, 0 kept, 0 left out"
    assert {key.split("/")[0] for key in store.objects} == {"bucket"}
    assert "bucket/study of 2/volumes/index.csv" in store.objects
    puts = sum(method == "PUT" for method, _ in store.asked)
    assert ingested(here("ingest", scans, url, "--processes", "1")) == "0 written, 2 kept, 0 left out"
    assert sum(method == "PUT" for method, _ in store.asked) == puts + 1, "the index alone"
    here("ingest", scans, tmp_path / "out", "--processes", "1")
    for far, near in zip(read_index(url), read_index(tmp_path / "out"), strict=True):
        assert str(far.path).startswith("s3://")
        assert read_attributes(far.path)["checksum"] == read_attributes(near.path)["checksum"]
        volume, _ = read_volume(far.path)
        np.testing.assert_array_equal(volume.hu, read_volume(near.path)[0].hu)
        np.testing.assert_array_equal(read_slab(far.path, axis="y", start=60, stop=62), volume.hu[:, 60:62])
    assert any("continuation-token" in path for _, path in store.asked), "a volume has more keys than a page"


def test_a_scan_that_changed_takes_the_place_of_the_old_volume_and_nothing_stays(scans: Path, store: LoopbackS3, here):
    url = "s3://bucket/volumes"
    here("ingest", scans, url, "--processes", "1")
    before = {key for key in store.objects if "/P-1.zarr/" in key}
    manifest = scans / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("1.nii.gz,1", "1.nii.gz,0"))
    assert ingested(here("ingest", scans, url, "--processes", "1")) == "1 written, 1 kept, 0 left out"
    after = {key for key in store.objects if "/P-1.zarr/" in key}
    assert before & after == {"bucket/volumes/ward-a/P-1.zarr/zarr.json"}
    assert len(after) == len(before)
    assert read_volume(f"{url}/ward-a/P-1.zarr")[1]["label"] == 0


def test_of_two_writers_at_one_time_one_wins_and_the_volume_is_whole(scans: Path, store: LoopbackS3, monkeypatch, here):
    """The second one to end finds that the marker has moved since it began."""
    url = "s3://bucket/volumes"
    here("ingest", scans, url, "--processes", "1")
    place = f"{url}/ward-a/P-0.zarr"
    volume, attributes = read_volume(place)
    del attributes["checksum"]
    write, begun, ended = zarr_group._write_array, threading.Event(), threading.Event()

    def slowly(root, name, array):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert ended.wait(60)
        return write(root, name, array)

    monkeypatch.setattr(zarr_group, "_write_array", slowly)
    refusals: list[StorageError] = []

    def slower() -> None:
        try:
            write_volume(place, volume, attributes={**attributes, "by": "slower"})
        except StorageError as error:
            refusals.append(error)

    thread = threading.Thread(target=slower)
    thread.start()
    assert begun.wait(60)
    write_volume(place, volume, attributes={**attributes, "by": "faster"})
    ended.set()
    thread.join(60)
    assert len(refusals) == 1
    assert "another process wrote it meanwhile; run the same command again" in str(refusals[0])
    assert read_volume(place)[1]["by"] == "faster"


def test_a_store_that_refuses_is_named_in_one_line_and_loses_nothing(scans: Path, store: LoopbackS3, here, refused):
    url = "s3://bucket/volumes"
    store.refuse["PUT"] = [403]
    message = refused("ingest", scans, url, "--processes", "1")
    assert message.startswith("s3://bucket/volumes/.pseudonym-salt: cannot be written (PERMISSION_DENIED")
    assert message.endswith("check the store's access")
    assert store.objects == {}
    here("ingest", scans, url, "--processes", "1")
    held = dict(store.objects)
    manifest = scans / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("0.nii.gz,0", "0.nii.gz,1"))
    store.refuse["PUT"] = [403]
    assert "P-0.zarr: cannot be written" in refused("ingest", scans, url, "--processes", "1")
    assert store.objects == held
    damaged = next(key for key in held if "/P-0.zarr/" in key and "/hu/c/" in key)
    store.objects[damaged] = store.objects[damaged][:-10]
    with pytest.raises(CorruptVolume, match=r"P-0\.zarr: unreadable .* delete it and ingest the scan again"):
        read_volume(f"{url}/ward-a/P-0.zarr")
