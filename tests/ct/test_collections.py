"""Every collection in a miniature of its documented layout: labels, splits, patients, hospitals; and wrong trees."""

from collections import Counter

import nibabel
import numpy as np
import pytest
from PIL import Image

from capsfl.ct import errors
from capsfl.ct.collections import CollectionConfig, read_collection, read_manifest
from capsfl.ct.ingest import MASK, ingest
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.pictures import read_pictures
from capsfl.ct.volumes import read_volume

AFFINE = np.diag([-3.0, -3.0, 5.0, 1.0])


def config_of(name, **fields):
    return CollectionConfig(name=name, side=16, **fields)


def write_picture(path, *, size=(20, 24), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def write_nifti(path, values=None, *, fill=-900):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((12, 12, 6), fill, np.int16) if values is None else values
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
    return path


def run(source, out, config, **arguments):
    return ingest(
        source, out, config=VolumeConfig(center="volume"), collection=config, processes=1, progress=False, **arguments
    )


def facts(collection):
    """Patient to (hospital, label, split, pictures)."""
    return {entry.patient: (entry.hospital, entry.label, entry.split, len(entry.files)) for entry in collection.entries}


# COVIDx-CT ------------------------------------------------------------------------------------------------------------

COVIDX = {
    "train": ["NCP_96_1328_0035.png 2 9 5 461 405", "NCP_96_1329_0001.png 2 0 0 10 10", "NCP_9_7_0001.png 2 0 0 10 10",
              "CP_1069_3089_0001.png 1 0 0 10 10", "Normal_1_2_0003.png 0 0 0 10 10"],
    "val": ["137covid_patient1_SR_2_IM00001.png 2 0 0 10 10", "LIDC-IDRI-0007-0012.png 0 0 0 10 10"],
    "test": ["LIDC-IDRI-0007-0013.png 0 0 0 10 10", "coronacases_001-0014.png 2 0 0 10 10"],
}  # fmt: skip
COVIDX_METADATA = """patient id,source,country,finding
NCP_96,CNCB,China,COVID-19
NCP_9,CNCB,China,COVID-19
CP_1069,CNCB,China,Pneumonia
Normal_1,CNCB,China,Normal
137covid_patient1,COVID-CTSet,Iran,COVID-19
LIDC-IDRI-0007,LIDC-IDRI,USA,Normal
coronacases_001,"Coronacases.org",,COVID-19
"""


@pytest.fixture
def covidx(tmp_path):
    root = tmp_path / "covidx"
    for split, lines in COVIDX.items():
        for line in lines:
            write_picture(root / "2A_images" / line.split()[0], size=(420, 470) if "0035" in line else (20, 24))
        (root / f"{split}_COVIDx_CT-2A.txt").write_text("\n".join(lines) + "\n")
    (root / "metadata.csv").write_text(COVIDX_METADATA)
    return root


def test_covidx_ct_has_three_classes_and_the_sources_for_hospitals(covidx):
    found = read_collection(covidx, config_of("covidx-ct", labels="all"))
    assert found.classes == ("normal", "pneumonia", "COVID")
    assert facts(found) == {
        "NCP_96": ("CNCB", 2, "train", 2),
        "NCP_9": ("CNCB", 2, "train", 1),
        "CP_1069": ("CNCB", 1, "train", 1),
        "Normal_1": ("CNCB", 0, "train", 1),
        "137covid_patient1": ("COVID-CTSet", 2, "validation", 1),
        "LIDC-IDRI-0007": ("LIDC-IDRI", 0, "test", 2),
        "coronacases_001": ("Coronacases.org", 2, "test", 1),
    }
    (note,) = found.notes
    assert note.startswith("the official lists part 1 patients; each went whole to the test set")
    disease = read_collection(covidx, config_of("covidx-ct"))
    assert disease.classes == ("not COVID", "COVID")
    assert Counter(entry.label for entry in disease.entries) == {1: 4, 0: 3}


def test_covidx_ct_without_metadata_reads_patients_off_the_names(covidx):
    (covidx / "metadata.csv").unlink()
    found = read_collection(covidx, config_of("covidx-ct"))
    assert set(facts(found)) == {
        "NCP_96", "NCP_9", "CP_1069", "Normal_1", "137covid_patient1", "LIDC-IDRI-0007", "coronacases_001",
    }  # fmt: skip
    assert {entry.hospital for entry in found.entries} == {"covidx-ct"}
    assert "metadata.csv is absent" in found.notes[0]


def test_covidx_ct_is_cut_to_the_boxes_of_its_lists(covidx, tmp_path):
    picture = np.zeros((420, 470), np.uint8)
    picture[5:405, 9:461] = 200
    Image.fromarray(picture).save(covidx / "2A_images" / "NCP_96_1328_0035.png")
    report = run(covidx, tmp_path / "out", config_of("covidx-ct", levels="kept"))
    (entry,) = [entry for entry in report.index if entry.patient == "NCP_96"]
    pictures, _ = read_pictures(entry.path)
    assert (pictures.pixels[0] == 200).all()
    assert pictures.original_sizes.tolist() == [[400, 452], [10, 10]]
    path = covidx / "test_COVIDx_CT-2A.txt"
    path.write_text(path.read_text().replace("0 0 10 10", "0 0 10 100"))
    with pytest.raises(errors.WrongFormat, match=r"0013\.png: box \(0, 0, 10, 100\) leaves its 24 x 20 pixels"):
        run(covidx, tmp_path / "out", config_of("covidx-ct"))


# MosMedData -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mosmed(tmp_path):
    root = tmp_path / "COVID19_1110"
    for number, severity in enumerate((0, 1, 1, 2, 3, 4), start=1):
        write_nifti(root / "studies" / f"CT-{severity}" / f"study_{number:04d}.nii.gz")
    mask = np.zeros((12, 12, 6), np.uint8)
    mask[3:9, 3:9, 1:5] = 1
    write_nifti(root / "masks" / "study_0002_mask.nii.gz", mask)
    return root


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


# SARS-CoV-2 CT --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sars(tmp_path):
    root = tmp_path / "sars"
    for number in range(1, 7):
        write_picture(root / "COVID" / f"Covid ({number}).png")
        write_picture(root / "non-COVID" / f"Non-Covid ({number}).png")
    return root


def test_sars_cov_2_ct_names_no_patients_so_it_is_for_testing_only(sars):
    for split in ("official", "study"):
        found = read_collection(sars, config_of("sars-cov-2-ct", split=split))
        assert Counter((entry.label, entry.split) for entry in found.entries) == {(0, "test"): 6, (1, "test"): 6}
        assert "names no patients" in found.notes[0]
    with pytest.raises(errors.ManifestError, match=r"collection\.split = \"drawn\".*names no patients.*pictures"):
        read_collection(sars, config_of("sars-cov-2-ct", split="drawn"))


def test_sars_cov_2_ct_with_a_table_of_patients_is_split_by_patient(sars):
    rows = [f"{kind}/{stem} ({n}).png,{kind}-{n % 3}" for kind, stem in (("COVID", "Covid"), ("non-COVID", "Non-Covid"))
            for n in range(1, 7)]  # fmt: skip
    (sars / "patients.csv").write_text("\n".join(["picture,patient", *rows]))
    config = config_of("sars-cov-2-ct", pictures="patients.csv", split="drawn", validation_fraction=0.0)
    found = read_collection(sars, config)
    assert Counter((entry.label, entry.split, len(entry.files)) for entry in found.entries) == {
        (label, split, 2): count for label in (0, 1) for split, count in (("train", 2), ("test", 1))
    }
    (sars / "patients.csv").write_text("\n".join(["picture,patient", *rows[:-1]]))
    with pytest.raises(errors.ManifestError, match=r"1 of 12 pictures have no row"):
        read_collection(sars, config)
    (sars / "patients.csv").write_text("picture,patient\nCOVID/absent.png,x")
    with pytest.raises(errors.ManifestError, match=r"patients\.csv:2: no picture 'COVID/absent\.png'"):
        read_collection(sars, config)


# Folders of pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["normal/p1/1.png", "normal/p1/2.png", "normal/p2/1.png", "COVID/p1/1.png", "COVID/p3/1.png"],
        ["normal/p1_1.png", "normal/p1_2.png", "normal/p2-001.jpg", "COVID/p1%3.png", "COVID/p3 (1).png"],
        ["Normal/p1-IM0001.png", "Normal/p1-IM0002.png", "Normal/p2.png", "positive/p1.png", "positive/p3 slice 4.png"],
    ],
)
def test_an_image_folder_has_a_patient_for_every_folder_or_stem(tmp_path, names):
    for name in names:
        write_picture(tmp_path / name)
    found = read_collection(tmp_path, config_of("image-folder"))
    assert Counter((entry.label, len(entry.files)) for entry in found.entries) == {(0, 2): 1, (0, 1): 1, (1, 1): 2}
    assert {entry.patient for entry in found.entries} == {f"patient-000{n}" for n in range(1, 5)}


def test_an_image_folder_may_be_split_and_patterned(tmp_path):
    for split in ("train", "test"):
        for name in ("bacterial/a-x-1.png", "healthy/b-x-2.png", f"viral/{split}-y-3.png"):
            write_picture(tmp_path / split / name)
    config = config_of(
        "image-folder", labels="all", patient_pattern=r"([a-z]+)-[xy]-", classes=("healthy", "bacterial", "viral")
    )
    found = read_collection(tmp_path, config)
    assert found.classes == ("healthy", "bacterial", "viral")
    assert Counter((entry.label, entry.split, len(entry.files)) for entry in found.entries) == {
        (0, "test", 2): 1, (1, "test", 2): 1, (2, "test", 1): 1, (2, "train", 1): 1,
    }  # fmt: skip
    assert "part 2 patients" in found.notes[0]
    with pytest.raises(errors.ManifestError, match=r"collection\.classes = \['healthy', 'viral'\]: .*'bacterial' too"):
        read_collection(tmp_path, config.model_copy(update={"classes": ("healthy", "viral")}))
    with pytest.raises(errors.WrongLayout, match=r"patient_pattern = 'zz' does not match a-x-1\.png"):
        read_collection(tmp_path, config.model_copy(update={"patient_pattern": "zz"}))


# CC-19 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cc19(tmp_path):
    root = tmp_path / "cc19"
    rows = []
    for split, kind, stem, slices in (
        ("train", "positive", "p1", 3),
        ("train", "positive", "p10", 2),
        ("train", "negative", "n1", 2),
        ("test", "positive", "p2", 2),
        ("test", "negative", "n2", 1),
    ):
        rows.append(f"{split},{kind},{stem},{slices}")
        for index in range(slices):
            write_picture(root / "data" / split / kind / f"{stem}-{index:04d}.jpg")
    (root / "data_file.csv").write_text("\n".join(rows) + "\n")
    return root


def test_cc_19_in_two_dimensions_follows_its_list(cc19):
    found = read_collection(cc19, config_of("cc-19"))
    assert found.classes == ("negative", "positive")
    assert Counter((entry.label, entry.split, len(entry.files)) for entry in found.entries) == {
        (1, "train", 3): 1, (1, "train", 2): 1, (0, "train", 2): 1, (1, "test", 2): 1, (0, "test", 1): 1,
    }  # fmt: skip
    assert {entry.hospital for entry in found.entries} == {"cc-19"}
    (cc19 / "table.csv").write_text("patient,hospital,scanner\np1,A,A1\np10,A,A2\nn1,B,B3\np2,B,B3\n")
    found = read_collection(cc19, config_of("cc-19", table="table.csv"))
    assert Counter(entry.hospital for entry in found.entries) == {"A": 2, "B": 2, "cc-19": 1}
    assert found.notes == ("1 of 5 scans have no row in table.csv",)


def test_a_stem_takes_no_slices_of_a_longer_number(cc19):
    write_picture(cc19 / "data" / "train" / "positive" / "p11-0000.jpg")  # which the list does not name
    found = read_collection(cc19, config_of("cc-19"))
    assert sorted(len(entry.files) for entry in found.entries if entry.split == "train") == [2, 2, 3]


def test_cc_19_as_dicom_is_any_tree(tmp_path, write_series):
    def of(patient, institution, model):
        def edit(_, dataset):
            dataset.PatientID = patient
            dataset.InstitutionName = institution
            dataset.ManufacturerModelName = model

        return edit

    root = tmp_path / "archive"
    shape = (5, 8, 8)
    write_series(root / "x" / "Positive" / "Doe", shape=shape, uid="1.2.1", edit=of("Doe^John", "Chengdu 1", "A1"))
    # One folder holds two series of two patients, and a patient has a second, smaller series.
    write_series(root / "mixed", shape=shape, uid="1.2.2", edit=of("Roe^Jane", "Chengdu 2", "B3"))
    write_series(root / "mixed", shape=shape, uid="1.2.3", edit=of("Poe^Ed", "Chengdu 1", "A1"))
    write_series(root / "y" / "normal", shape=(4, 8, 8), uid="1.2.4", edit=of("Roe^Jane", "Chengdu 2", "B3"))
    write_series(root / "y" / "scout", shape=(2, 8, 8), uid="1.2.5", edit=of("Roe^Jane", "Chengdu 2", "B3"))
    found = read_collection(root, config_of("cc-19"))
    assert facts(found) == {
        "patient-0001": ("site-0001", 1, None, 5),
        "patient-0002": ("site-0001", None, None, 5),
        "patient-0003": ("site-0002", None, None, 5),
    }
    assert [entry.scanner for entry in found.entries] == ["ACME A1", "ACME A1", "ACME B3"]
    assert set(found.notes) == {
        "1 series of fewer slices than a volume needs are left out",
        "1 further series of patients with several are left out",
        "labels taken from the names of folders: 1 x positive",
    }
    scanners = read_collection(root, config_of("cc-19", hospitals="scanner"))
    assert Counter(entry.hospital for entry in scanners.entries) == {"ACME-A1": 2, "ACME-B3": 1}
    (root / "labels.csv").write_text("folder,label,hospital\nmixed,1,B\nx,0,A\n")
    labelled = read_collection(root, config_of("dicom-folder", table="labels.csv", series="every"))
    assert [(entry.patient, entry.hospital, entry.label) for entry in labelled.entries] == [
        ("patient-0001", "A", 0),
        ("patient-0002", "B", 1),
        ("patient-0003", "B", 1),
        ("patient-0003-s2", "B", 0),
    ]
    assert "1 person with scans in several hospitals: all scans count with the hospital of the first" in labelled.notes
    out = tmp_path / "out"
    report = run(root, out, config_of("dicom-folder", series="every"))
    assert (report.written, report.failed) == (4, ())
    stored = "".join(str(path) + path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    for secret in ("Doe", "Roe", "Jane", "Chengdu", "1.2.1", "SECRET"):
        assert secret not in stored
    assert [entry.person for entry in report.index] == ["patient-0001", "patient-0002", "patient-0003", "patient-0003"]
    assert run(root, out, config_of("dicom-folder", series="every")).kept == 4


@pytest.fixture
def archive(tmp_path, write_series):
    """Eight people with a series at the north and one at the south, on two scanners, and a ninth with scouts alone."""
    root = tmp_path / "archive"
    for number in range(1, 10):
        for site in ("north", "south"):

            def edit(_, dataset, number=number, site=site):
                dataset.PatientID = f"id-{10 - number}"
                dataset.InstitutionName = site
                dataset.ManufacturerModelName = {"north": "One", "south": "Two"}[site]

            shape = (2 if number == 9 else 5 if site == "north" else 6, 8, 8)
            write_series(
                root / f"{number}-{site}", shape=shape, uid=f"1.2.{number}.{len(site) + ord(site[0])}", edit=edit
            )
    return root


@pytest.mark.parametrize("rule", ["collection", "scanner", "even", "dirichlet"])
@pytest.mark.parametrize("split", ["official", "drawn", "study"])
def test_a_person_is_in_one_hospital_and_one_split(archive, rule, split):
    config = config_of("dicom-folder", series="every", hospitals=rule, count=2, alpha=5.0, split=split)
    found = read_collection(archive, config)
    assert len(found.entries) == 16
    homes, splits = {}, {}
    for entry in found.entries:
        homes.setdefault(entry.person, set()).add(entry.hospital)
        splits.setdefault(entry.person, set()).add(entry.split)
    assert len(homes) == 8
    assert all(len(names) == 1 for names in (*homes.values(), *splits.values()))
    moved = "8 persons with scans in several hospitals: all scans count with the hospital of the first"
    assert (moved in found.notes) == (rule in ("collection", "scanner"))


def test_splits_of_a_table_part_nobody(archive):
    (archive / "table.csv").write_text("folder,split\n1-north,train\n1-south,test\n2-north,train\n")
    found = read_collection(archive, config_of("dicom-folder", series="every", table="table.csv"))
    uses = {entry.patient: entry.split for entry in found.entries if entry.split}
    assert uses == {
        "patient-0009": "test",
        "patient-0009-s2": "test",
        "patient-0008": "train",
        "patient-0008-s2": "train",
    }
    assert any(note.startswith("1 person with scans in several splits") for note in found.notes)


def test_preflight_and_ingestion_call_a_series_the_same(archive):
    """`leave_out` takes the names of the one for the other; here the first patient and site hold nothing usable."""
    every = config_of("dicom-folder", series="every")
    table = read_collection(archive, every, all_series=True).entries
    names = {entry.files: entry.patient for entry in table}
    sites = {entry.files: entry.hospital for entry in table}
    assert len(table) == 18
    for config in (every, config_of("dicom-folder")):
        entries = read_collection(archive, config).entries
        assert {entry.files: names[entry.files] for entry in entries} == {e.files: e.patient for e in entries}
        firsts = [entry for entry in entries if entry.patient == entry.person]
        assert len(firsts) == 8
        assert {entry.hospital for entry in firsts} == {sites[entry.files] for entry in firsts} == {"site-0002"}
        assert all(len(entry.files) == 6 for entry in firsts), "the largest stands for a patient"
    left = read_collection(archive, every.model_copy(update={"leave_out": ("patient-0002",)})).entries
    gone = {entry.files for entry in read_collection(archive, every).entries} - {entry.files for entry in left}
    assert gone == {entry.files for entry in table if entry.person == "patient-0002"}


def test_numbers_for_folders_are_no_labels(tmp_path, write_series):
    for number, folder in enumerate(("0", "1", "1/covid", "normal/0")):

        def edit(_, dataset, number=number):
            dataset.PatientID = f"id-{number}"

        write_series(tmp_path / "tree" / folder, shape=(4, 8, 8), uid=f"1.2.{number}", edit=edit)
    found = read_collection(tmp_path / "tree", config_of("dicom-folder"))
    assert [entry.label for entry in found.entries] == [None, None, 1, 0]
    assert found.notes == ("labels taken from the names of folders: 1 x covid, 1 x normal",)


@pytest.mark.parametrize("identity", ["", "ANON", "Anonymous", "0000"])
def test_an_id_that_stands_for_nobody_pools_a_study_and_no_more(tmp_path, write_series, identity):
    for number, study in enumerate(("1.9.1", "1.9.1", "1.9.2")):

        def edit(_, dataset, study=study):
            dataset.PatientID, dataset.StudyInstanceUID = identity, study

        write_series(tmp_path / str(number), shape=(4, 8, 8), uid=f"1.2.{number}", edit=edit)
    found = read_collection(tmp_path, config_of("dicom-folder", series="every"))
    assert [entry.person for entry in found.entries] == ["patient-0001", "patient-0001", "patient-0002"]
    assert "3 series name no patient: those of one study count as one person's" in found.notes


def test_files_without_a_series_uid_are_grouped_by_folder(tmp_path, write_series):
    def forget(_, dataset):
        del dataset.SeriesInstanceUID
        del dataset.StudyInstanceUID
        dataset.PatientID = ""

    for name in ("a", "b"):
        write_series(tmp_path / "tree" / name, shape=(5, 8, 8), edit=forget)
    found = read_collection(tmp_path / "tree", config_of("dicom-folder"))
    assert len(found.entries) == 2
    assert run(tmp_path / "tree", tmp_path / "out", config_of("dicom-folder")).written == 2


# NIfTI folders --------------------------------------------------------------------------------------------------------


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


# Manifests and tables -------------------------------------------------------------------------------------------------


def test_a_manifest_may_point_at_pictures_and_count_classes(tmp_path, write_series):
    for name in ("a/1.png", "a/2.png", "b 1.jpg", "b%2.jpg"):
        write_picture(tmp_path / name)
    write_series(tmp_path / "series", shape=(5, 8, 8))
    (tmp_path / "manifest.csv").write_text(
        "patient,hospital,image,label\nA,h,a,0\nB,h,b 1.jpg,2\nB,h,b%2.jpg,2\nC,h,series,1\n"
    )
    entries = read_manifest(tmp_path / "manifest.csv")
    assert [(e.patient, e.kind, e.label, [path.name for path in e.files]) for e in entries] == [
        ("A", "pictures", 0, ["1.png", "2.png"]),
        ("B", "pictures", 2, ["b 1.jpg", "b%2.jpg"]),
        ("C", "volume", 1, []),
    ]
    report = run(tmp_path, tmp_path / "out", config_of("manifest"))
    assert [(entry.patient, entry.kind) for entry in report.index] == [
        ("A", "pictures"), ("B", "pictures"), ("C", "volume"),
    ]  # fmt: skip
    for rows, message in (
        ("B,h,b 1.jpg,2\nB,h,b%2.jpg,1", r":3: patient 'B'.*with label 2, not 1"),
        ("B,h,b 1.jpg,2\nB,h,series,2", r":3: patient 'B'.*keep one scan per patient"),
        ("B,h,b 1.jpg,-1", r":2: label is '-1'"),
    ):
        (tmp_path / "manifest.csv").write_text(f"patient,hospital,image,label\n{rows}\n")
        with pytest.raises(errors.ManifestError, match=message):
            read_manifest(tmp_path / "manifest.csv")


def test_a_table_deals_the_patients_of_any_collection_to_hospitals(mosmed):
    rows = [f"study_{number:04d},{'east' if number % 2 else 'west'}" for number in range(1, 7)]
    (mosmed / "sites.csv").write_text("\n".join(["patient,hospital", *rows]))
    found = read_collection(mosmed, config_of("mosmed", table="sites.csv"))
    assert [entry.hospital for entry in found.entries] == ["east", "west"] * 3


def test_patients_of_one_name_do_not_become_one_volume(tmp_path):
    """Two sites may both have a p1; a scanner, or a table, may put both into one hospital."""
    rows = ["patient,hospital,image,scanner"]
    for site in ("east", "west"):
        for patient in ("p1", "P2"):
            write_nifti(tmp_path / site / f"{patient}.nii.gz")
            rows.append(f"{patient if site == 'east' else patient.lower()},{site},{site}/{patient}.nii.gz,S 1")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    (tmp_path / "table.csv").write_text("patient,hospital\np1,joint\n")
    for config in (config_of("manifest", hospitals="scanner"), config_of("manifest", table="table.csv")):
        entries = read_collection(tmp_path, config).entries
        assert len({(entry.hospital.lower(), entry.patient.lower()) for entry in entries}) == 4
        assert [entry.patient for entry in entries] == ["east-p1", "east-P2", "west-p1", "west-p2"]
    left = read_collection(tmp_path, config_of("manifest", hospitals="scanner", leave_out=("east-p1",))).entries
    assert [entry.patient for entry in left] == ["east-P2", "west-p1", "west-p2"]


def test_two_scans_of_one_name_are_refused(mosmed):
    write_nifti(mosmed / "studies" / "CT-3" / "study_0001.nii.gz")
    with pytest.raises(errors.ManifestError, match="patient 'study_0001' of hospital 'mosmed': two scans"):
        read_collection(mosmed, config_of("mosmed"))


def test_a_manifest_says_which_scans_are_one_persons(tmp_path):
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / f"{name}.nii.gz")
    head = "patient,hospital,image,split,person\n"
    (tmp_path / "manifest.csv").write_text(f"{head}a,x,a.nii.gz,,P\nb,x,b.nii.gz,,P\nc,y,c.nii.gz,,\n")
    config = config_of("manifest", hospitals="even", count=2)
    one, two, other = read_collection(tmp_path, config).entries
    assert one.whose == two.whose != other.whose
    assert one.hospital == two.hospital != other.hospital
    for row, message in (
        ("b,y,b.nii.gz,,P", r":3: person 'P' stands in line 2 with hospital 'x', not 'y'"),
        ("b,x,b.nii.gz,test,P", r":3: person 'P' stands in line 2 with split None, not 'test'"),
        ("b,x,b.nii.gz,,P Q", r":3: person is 'P Q'"),
    ):
        (tmp_path / "manifest.csv").write_text(f"{head}a,x,a.nii.gz,,P\n{row}\n")
        with pytest.raises(errors.ManifestError, match=message):
            read_manifest(tmp_path / "manifest.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("label,hospital\n1,A", r"expected one of the columns patient, series, folder; found none"),
        ("patient,folder\np1,A", r"found patient, folder"),
        ("patient,label\np1,1\np1,0", r":3: patient 'p1' stands in line 2 already"),
        ("patient,label\nnobody,1", r":2: no scan with patient 'nobody' here"),
        ("patient,label\np1,yes", r":2: label is 'yes'"),
        ("patient,hospital\np1,a b", r":2: hospital is 'a b'"),
        ("patient,split\np1,dev", r":2: split is 'dev'"),
        ("patient,colour\np1,red", r"column 'colour' is unknown"),
    ],
)
def test_a_bad_table_is_named_with_its_line(cc19, rows, message):
    (cc19 / "table.csv").write_text(rows)
    with pytest.raises(errors.ManifestError, match=message):
        read_collection(cc19, config_of("cc-19", table="table.csv"))


# Wrong trees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("covid-ct", r"expected Images/CT_NonCOVID or Images-processed/CT_NonCOVID or CT_NonCOVID, found notes\.txt"),
        ("covidx-ct", r"expected \{train,val,test\}_COVIDx_CT-2A\.txt of one version, found notes\.txt"),
        ("cc-19", r"expected DICOM series of 4 slices or more, found 1 x \.txt file, not DICOM"),
        ("mosmed", r"expected studies or COVID19_1110/studies, found notes\.txt"),
        ("covid-19-ct-seg", r"expected COVID-19-CT-Seg_20cases, found notes\.txt"),
        ("sars-cov-2-ct", r"expected non-COVID, found notes\.txt"),
        ("nifti-folder", r"expected \*\.nii\.gz, found notes\.txt"),
        ("image-folder", r"expected <class>/<patient>.*, found notes\.txt"),
        ("dicom-folder", r"expected DICOM series of 4 slices or more"),
    ],
)
def test_a_wrong_tree_says_what_was_expected_and_what_was_found(tmp_path, name, expected):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(errors.WrongLayout, match=expected) as caught:
        read_collection(tmp_path, config_of(name))
    assert "\n" not in str(caught.value)
    with pytest.raises(errors.WrongLayout, match="no such file or folder"):
        read_collection(tmp_path / "absent", config_of(name))


def test_what_cannot_be_opened_is_named_and_links_are_followed(tmp_path):
    for name in ("normal/p1.png", "elsewhere/p2.png"):
        write_picture(tmp_path / name)
    write_nifti(tmp_path / "normal" / "a.nii.gz")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "normal").symlink_to(tmp_path / "normal")
    (tmp_path / "tree" / "COVID").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "COVID" / "loop").symlink_to(tmp_path / "tree")
    found = read_collection(tmp_path / "tree", config_of("image-folder"))
    assert Counter(entry.label for entry in found.entries) == {0: 1, 1: 1}
    (tmp_path / "tree" / "gone").symlink_to(tmp_path / "absent")
    for name in ("image-folder", "nifti-folder"):
        with pytest.raises(errors.Unreadable, match="gone: cannot be read"):
            read_collection(tmp_path / "tree", config_of(name))


def test_wrong_parts_of_right_trees_are_named(cc19, covidx, mosmed, ct_seg):
    (cc19 / "data_file.csv").write_text("train,positive,p1,3\ntrain,positive,absent,3\n")
    with pytest.raises(
        errors.WrongLayout, match=r"expected slices of every stem in data_file\.csv, found none of absent"
    ):
        read_collection(cc19, config_of("cc-19"))
    (cc19 / "data_file.csv").write_text("train,positive,p1\n")
    with pytest.raises(errors.WrongLayout, match="line 1 is not"):
        read_collection(cc19, config_of("cc-19"))
    (covidx / "2A_images" / "CP_1069_3089_0001.png").unlink()
    with pytest.raises(errors.WrongLayout, match=r"the 9 pictures that the lists name, found 8 in 2A_images \(no CP_"):
        read_collection(covidx, config_of("covidx-ct"))
    (covidx / "val_COVIDx_CT-2A.txt").write_text("a.png 3 0 0 1 1\n")
    with pytest.raises(errors.WrongLayout, match="row 1 is not `file class xmin ymin xmax ymax`"):
        read_collection(covidx, config_of("covidx-ct"))
    (mosmed / "studies" / "CT-1" / "study_0002.nii.gz").unlink()
    with pytest.raises(errors.WrongLayout, match=r"masks without a study \(study_0002\)"):
        read_collection(mosmed, config_of("mosmed"))
    (ct_seg / "Lung_and_Infection_Mask" / "coronacases_002.nii.gz").unlink()
    with pytest.raises(errors.WrongLayout, match=r"no mask for coronacases_002\.nii\.gz"):
        read_collection(ct_seg, config_of("covid-19-ct-seg"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patient_pattern": "("}, "not a regular expression"),
        ({"test_fraction": 0.6, "validation_fraction": 0.4}, "nobody is left to train on"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"side": 4}, "greater than or equal to 16"),
        ({"pictures": "x.csv"}, r"pictures = 'x\.csv': of sars-cov-2-ct alone, not of image-folder; leave it out"),
        ({"series": "every"}, r"of dicom-folder and cc-19 alone"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CollectionConfig(name="image-folder", **fields)


def test_a_study_names_its_collection_in_its_configuration(tmp_path):
    from capsfl.config import ConfigError, load_config

    path = tmp_path / "study.toml"
    text = """
        [data]
        source = "slices"
        [data.collection]
        name = "image-folder"
        hospitals = "dirichlet"
        alpha = 1.0
        classes = ["a", "b"]
        [segmentation]
    """
    path.write_text(text)
    collection = load_config(path).data.collection
    assert collection == CollectionConfig(name="image-folder", hospitals="dirichlet", alpha=1.0, classes=("a", "b"))
    path.write_text(text.replace("dirichlet", "dirichlett"))
    with pytest.raises(
        ConfigError, match=r"data\.collection\.hospitals = \"dirichlett\": Input should be 'collection'"
    ):
        load_config(path)
