"""What all collections share: a wrong tree, what cannot be opened and settings that cannot work are named."""

from collections import Counter

import pytest
from collection_trees import config_of, write_nifti, write_picture

from capsfl.config import ConfigError, load_config
from capsfl.ct import errors
from capsfl.ct.collections import CollectionConfig, read_collection


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
