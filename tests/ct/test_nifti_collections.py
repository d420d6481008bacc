"""Collections of NIfTI volumes: labels, masks and hospitals of MosMedData, COVID-19-CT-Seg and folders of volumes."""

from collections import Counter

import numpy as np
import pytest
from collection_trees import config_of, facts, run, write_mosmed, write_nifti

from capsfl.ct import errors
from capsfl.ct.collections import read_collection
from capsfl.ct.ingest import MASK
from capsfl.ct.volumes import read_volume

# MosMedData -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mosmed(tmp_path):
    return write_mosmed(tmp_path / "COVID19_1110")


def test_mosmed_is_labelled_by_severity(mosmed, tmp_path):
    found = read_collection(mosmed, config_of("mosmed", labels="all"))
    assert [entry.label for entry in found.entries] == [0, 1, 1, 2, 3, 4]
    assert len(found.classes) == 5
    found = read_collection(mosmed.parent / "COVID19_1110", config_of("mosmed"))
    assert [entry.label for entry in found.entries] == [0, 1, 1, 1, 1, 1]
    assert [entry.patient for entry in found.entries if entry.mask] == ["study_0002"]
    report = run(mosmed, tmp_path / "out", config_of("mosmed"))
    volume, _ = read_volume(report.index[1].path)
    assert volume.masks[MASK].any()


def test_a_mask_without_a_study_of_mosmed_is_named(mosmed):
    (mosmed / "studies" / "CT-1" / "study_0002.nii.gz").unlink()
    with pytest.raises(errors.WrongLayout, match=r"masks without a study \(study_0002\)"):
        read_collection(mosmed, config_of("mosmed"))


# COVID-19-CT-Seg ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ct_seg(tmp_path):
    root = tmp_path / "zenodo"
    mask = np.zeros((12, 12, 6), np.uint8)
    mask[1:5], mask[7:11], mask[2:4, 3:6] = 1, 2, 3
    for name in ("coronacases_001", "coronacases_002"):
        write_nifti(root / "COVID-19-CT-Seg_20cases" / f"{name}.nii.gz")
        write_nifti(root / "Lung_and_Infection_Mask" / f"{name}.nii.gz", mask)
    windowed = np.full((12, 12, 6), 90, np.uint8)
    write_nifti(root / "COVID-19-CT-Seg_20cases" / "radiopaedia_4_85506_1.nii.gz", windowed)
    write_nifti(root / "Lung_and_Infection_Mask" / "radiopaedia_4_85506_1.nii.gz", mask)
    return root


def test_covid_19_ct_seg_tells_lesions_from_lungs_and_refuses_windowed_volumes(ct_seg, tmp_path):
    config = config_of("covid-19-ct-seg")
    found = read_collection(ct_seg, config)
    assert Counter(entry.hospital for entry in found.entries) == {"coronacases": 2, "radiopaedia": 1}
    with pytest.raises(errors.WrongFormat, match=r"radiopaedia.*not Hounsfield units"):
        run(ct_seg, tmp_path / "out", config)
    voxels = {}
    for mask in ("lesion", "lungs"):
        report = run(ct_seg, tmp_path / mask, config.model_copy(update={"mask": mask}), on_error="skip")
        assert [entry.patient for entry in report.index] == ["coronacases_001", "coronacases_002"]
        ((who, why),) = report.failed
        assert who == "radiopaedia/radiopaedia_4_85506_1"
        assert "not Hounsfield units" in why
        volume, _ = read_volume(report.index[0].path)
        voxels[mask] = int(volume.masks[MASK].sum())
    # 2 x 3 x 6 of 8 x 12 x 6 voxels are lesion.
    assert voxels["lesion"] / voxels["lungs"] == pytest.approx(6 / 96, rel=0.2)


def test_a_volume_without_a_mask_of_covid_19_ct_seg_is_named(ct_seg):
    (ct_seg / "Lung_and_Infection_Mask" / "coronacases_002.nii.gz").unlink()
    with pytest.raises(errors.WrongLayout, match=r"no mask for coronacases_002\.nii\.gz"):
        read_collection(ct_seg, config_of("covid-19-ct-seg"))


# Folders of volumes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.nii.gz", "{}-msk.nii.gz"),
        ("images/{}.nii", "masks/{}.nii"),
        ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
        ("a/{}.nii.gz", "a/{}_seg.nii.gz"),
    ],
)
def test_a_nifti_folder_pairs_volumes_with_masks(tmp_path, image, mask):
    for name in ("scan 1", "scan%2"):
        write_nifti(tmp_path / image.format(name))
    write_nifti(tmp_path / mask.format("scan%2"), np.zeros((12, 12, 6), np.uint8))
    found = read_collection(tmp_path, config_of("nifti-folder", mask_threshold=0.7))
    assert [entry.mask is not None for entry in found.entries] == [False, True]
    assert [entry.mask_threshold for entry in found.entries] == [0.7, 0.7]
    assert {entry.hospital for entry in found.entries} == {"local"}
    write_nifti(tmp_path / mask.format("other"), np.zeros((12, 12, 6), np.uint8))
    with pytest.raises(errors.WrongLayout, match=r"masks without a volume \(other"):
        read_collection(tmp_path, config_of("nifti-folder"))


def test_folders_of_nifti_are_hospitals_and_a_table_labels_them(tmp_path):
    for site in ("north", "south wing"):
        for patient in ("a", "b"):
            write_nifti(tmp_path / site / f"{patient}.nii.gz")
    (tmp_path / "labels.csv").write_text("folder,label,split\nnorth,1,train\nsouth wing,0,test\n")
    found = read_collection(tmp_path, config_of("nifti-folder", table="labels.csv"))
    assert facts(found) == {
        "patient-0001": ("north", 1, "train", 0),
        "patient-0002": ("north", 1, "train", 0),
        "patient-0003": ("south-wing", 0, "test", 0),
        "patient-0004": ("south-wing", 0, "test", 0),
    }


def test_the_real_nifti_set_pairs_three_scans_with_their_lungs(shared_data, tmp_path):
    config = config_of("nifti-folder", mask_threshold=127.5)
    report = run(shared_data / "lung-masks-3d", tmp_path / "out", config)
    assert [entry.patient for entry in report.index] == ["patient-0001", "patient-0002", "patient-0003"]
    for entry in report.index:
        volume, _ = read_volume(entry.path)
        litres = volume.masks[MASK].sum() * np.prod(volume.spacing_mm) / 1e6
        assert 2 < litres < 8
        assert volume.hu[volume.masks[MASK]].mean() < -600
