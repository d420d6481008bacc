"""Collections of pictures: classes, splits and patients of COVIDx-CT, SARS-CoV-2 CT, CC-19 and folders of pictures."""

from collections import Counter

import numpy as np
import pytest
from collection_trees import config_of, facts, run, write_cc19, write_picture
from PIL import Image

from capsfl.ct import errors
from capsfl.ct.collections import read_collection
from capsfl.ct.pictures import read_pictures

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


def test_wrong_parts_of_covidx_ct_are_named(covidx):
    (covidx / "2A_images" / "CP_1069_3089_0001.png").unlink()
    with pytest.raises(errors.WrongLayout, match=r"the 9 pictures that the lists name, found 8 in 2A_images \(no CP_"):
        read_collection(covidx, config_of("covidx-ct"))
    (covidx / "val_COVIDx_CT-2A.txt").write_text("a.png 3 0 0 1 1\n")
    with pytest.raises(errors.WrongLayout, match="row 1 is not `file class xmin ymin xmax ymax`"):
        read_collection(covidx, config_of("covidx-ct"))


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


# CC-19 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cc19(tmp_path):
    return write_cc19(tmp_path / "cc19")


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


def test_wrong_parts_of_cc_19_are_named(cc19):
    (cc19 / "data_file.csv").write_text("train,positive,p1,3\ntrain,positive,absent,3\n")
    with pytest.raises(
        errors.WrongLayout, match=r"expected slices of every stem in data_file\.csv, found none of absent"
    ):
        read_collection(cc19, config_of("cc-19"))
    (cc19 / "data_file.csv").write_text("train,positive,p1\n")
    with pytest.raises(errors.WrongLayout, match="line 1 is not"):
        read_collection(cc19, config_of("cc-19"))


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
