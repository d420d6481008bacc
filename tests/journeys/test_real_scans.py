"""Real scans all the way: two DICOM series and three NIfTI volumes in, a lung mask on the series' own grid out."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from capsfl.ct.dicom import read_dicom
from capsfl.ct.ingest import MASK
from capsfl.ct.normalize import lung_mask
from capsfl.ct.volumes import read_volume
from capsfl.learning.masks import dice

pytestmark = pytest.mark.journey

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--segmentation.rounds", "6",
    "--segmentation.crops-per-plane", "32",
    "--segmentation.crop", "48",
    "--segmentation.planes", "xy",
    "--segmentation.model.width", "0.13",
    "--segmentation.local.learning-rate", "0.005",
)  # fmt: skip
"""The lung study of configs/real.toml, cut down to twenty seconds of one processor."""


def test_two_real_series_and_three_real_volumes_are_ingested_by_one_manifest(shared_data, tmp_path: Path, capsfl):
    words = ("ingest", ROOT / "configs" / "real.csv", tmp_path / "volumes", "--root", shared_data)
    assert "5 written, 0 kept, 0 left out" in capsfl(*words).out
    with (tmp_path / "volumes" / "index.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["split"] for row in rows] == ["train", "train", "test", "", ""]
    for row in rows:
        volume, _ = read_volume(tmp_path / "volumes" / row["volume"])
        assert volume.hu.shape == (128, 128, 128)
        assert (MASK in volume.masks) == row["hospital"].startswith("lungs-")
        dz, dy, dx = np.linalg.norm(volume.affine[:3, :3], axis=0)
        litres = lung_mask(volume.hu, (dz, dy, dx)).sum() * dz * dy * dx / 1e6
        assert 1 < litres < 8, f"{row['patient']}: no lungs of an adult"
    assert "0 written, 5 kept, 0 left out" in capsfl(*words).out


@pytest.fixture(scope="session")
def lung_study(once, capsfl, shared_data) -> Path:
    """A segmenter of lungs federated over two real scans, the third left out."""

    def build(place: Path) -> None:
        words = ("train", "configs/real.toml", "--data.root", shared_data, "--out", place, *SMALL)
        capsfl(*words, cwd=ROOT)

    return once("lungs", build)


def test_lungs_of_the_scan_left_out_are_found(lung_study: Path, here):
    results = json.loads((lung_study / "federated" / "results.json").read_text())["segmentation"]
    assert results["overall"]["patients"] == 1
    assert results["overall"]["dice"] > 0.8  # 0.94 when this was written
    assert here("verify", lung_study).code == 0


def test_the_mask_of_a_real_compressed_series_has_that_series_own_geometry(
    lung_study: Path, shared_data, tmp_path: Path, capsfl
):
    series = shared_data / "ricord1a-covid-ct-jpegll"
    capsfl("predict", lung_study, series, "--out", tmp_path)
    image = nibabel.Nifti1Image.from_filename(tmp_path / series.name / "mask.nii.gz")
    assert image.shape == (512, 512, 62)
    np.testing.assert_allclose(image.header.get_zooms(), (0.703125, 0.703125, 5.0), atol=1e-3)
    row = json.loads((tmp_path / series.name / "prediction.json").read_text())
    assert 1000 < row["mask_ml"] < 8000, "no lungs of an adult"
    scan = read_dicom(series)
    mask = np.asarray(image.dataobj).transpose(2, 1, 0) > 0
    lungs = scan.source.to_series(lung_mask(scan.hu, scan.spacing_mm))
    # COVID has thickened much of these lungs, and a threshold finds air only.
    assert dice(mask, lungs) > 0.7  # 0.89 when this was written
