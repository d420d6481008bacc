"""What normalization needs and promises: memory, the same bits whatever the threads, the way back from disk."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from capsfl.ct.normalize import PRESETS, VolumeConfig, standardize, to_scan_space
from capsfl.ct.phantom import SCANNERS, PhantomConfig, acquire, patient
from capsfl.ct.phantom.cohort import cohort
from capsfl.ct.phantom.series import write_series
from capsfl.ct.scan import Scan, ScanSource, as_rows
from capsfl.ct.volumes import read_volume, write_volume

MOST_VOLUMES = 3.0
"""A volume is the scan or its standard form in float32, whichever is larger; the scan itself counts."""


def make_scan(shape: tuple[int, int, int], spacing: tuple[float, float, float], *, padded: bool) -> Scan:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1.0
    hu = np.random.default_rng(0).uniform(-1000, 200, shape).astype(np.float32)
    valid = np.ones(shape, bool)
    if padded:
        valid[:, :9], valid[:, :, -5:] = False, False
        hu[~valid] = -1000
    source = ScanSource("nifti", "patient-0", shape, as_rows(affine), (0, 1, 2), (False, False, False))
    return Scan(hu, valid, affine, source)


@pytest.mark.parametrize(
    ("shape", "spacing", "preset"),
    [((40, 256, 256), (5.0, 1.4, 1.4), "half"), ((120, 256, 256), (2.0, 1.4, 1.4), "tiny")],
    ids=["grows", "shrinks"],
)
def test_a_scan_becomes_a_volume_in_less_than_three(shape, spacing, preset):
    tracemalloc.start()
    try:
        scan = make_scan(shape, spacing, padded=True)
        tracemalloc.reset_peak()
        volume = standardize(scan, config=VolumeConfig(preset=preset))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = 4 * max(scan.hu.size, volume.hu.size)
    assert scan.hu.nbytes + volume.hu.nbytes < peak < MOST_VOLUMES * largest


INGEST = """
import json, sys
from pathlib import Path
from capsfl.ct.ingest import ingest
from capsfl.ct.normalize import VolumeConfig

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

warm, series, out = map(Path, sys.argv[1:])
ingest(warm, out / "warm", config=VolumeConfig(), processes=1, progress=False)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
ingest(series, out / "volumes", config=VolumeConfig(preset="half"), processes=1, progress=False)
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    subject = cohort(PhantomConfig(hospitals=1, patients=1))[0]
    hu, _, _, geometry = acquire(patient(5, positive=True), SCANNERS[5], matrix=256, seed=5)
    for name, part in (("few", hu[:8]), ("series", hu)):
        (folder / name).mkdir()
        write_series(folder / name, part, geometry, subject=subject, identity="test")
    return folder


@pytest.fixture(scope="module")
def ingested(series, tmp_path_factory) -> dict[int, tuple[Path, int]]:
    """Volume and peak memory by the number of threads that numerical libraries are told to use."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process's memory cannot be started anew here")
    found = {}
    for threads in (1, 2):
        out = tmp_path_factory.mktemp("out")
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        done = subprocess.run(
            [sys.executable, "-c", INGEST, str(series / "few"), str(series / "series"), str(out)],
            env={**os.environ, **dict.fromkeys(names, str(threads))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (volume,) = (out / "volumes").glob("*/*.zarr")
        found[threads] = volume, json.loads(done.stdout)
    return found


def test_the_whole_of_ingesting_stays_below_three_volumes(ingested):
    for volume, peak in ingested.values():
        side = PRESETS["half"]
        assert read_volume(volume)[0].hu.shape == (side, side, side)
        assert side**3 < peak < MOST_VOLUMES * 4 * side**3


def test_one_thread_and_two_write_the_same_bytes(ingested):
    one, two = (
        {
            path.relative_to(volume).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in volume.rglob("*")
            if path.is_file() and path.parent != volume  # the group's own record names the pseudonym
        }
        for volume, _ in ingested.values()
    )
    assert one == two
    assert any(name.startswith("hu/c/") for name in one)
    checksums = [read_volume(volume)[1]["checksum"] for volume, _ in ingested.values()]
    assert checksums[0] == checksums[1]


def test_the_way_back_is_stored_with_the_volume(tmp_path):
    shape, spacing = (40, 60, 64), (6.0, 4.0, 4.0)
    z, y, x = (np.arange(size) - (size - 1) / 2 for size in shape)
    mask = (z[:, None, None] * 6 / 70) ** 2 + (y[:, None] * 4 / 60) ** 2 + (x * 4 / 50 - 0.2) ** 2 < 1
    plain = make_scan(shape, spacing, padded=False)
    # The series ran from the head down, in sagittal slices: the way back must undo that as well.
    source = ScanSource("dicom", "patient-0", (64, 40, 60), as_rows(np.eye(4)), (1, 2, 0), (True, False, False))
    scan = Scan(plain.hu, plain.valid, plain.affine, source)
    write_volume(tmp_path / "a.zarr", standardize(scan, config=VolumeConfig(), masks={"lesion": mask}), attributes={})
    volume, _ = read_volume(tmp_path / "a.zarr")
    back = to_scan_space(volume.masks["lesion"], volume.affine, volume.source_affine, volume.source_shape) >= 0.5
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.97
    assert volume.source.to_series(back).shape == (64, 40, 60)
    np.testing.assert_array_equal(volume.source.to_series(back), back[::-1].transpose(2, 0, 1))
