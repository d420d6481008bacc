"""Manifests, and tables beside a collection: what they may say, and the line of what they may not."""

import pytest
from collection_trees import config_of, run, write_cc19, write_mosmed, write_nifti, write_picture

from capsfl.ct import errors
from capsfl.ct.collections import read_collection, read_manifest


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


@pytest.fixture
def mosmed(tmp_path):
    return write_mosmed(tmp_path / "COVID19_1110")


def test_two_scans_of_one_name_are_refused(mosmed):
    write_nifti(mosmed / "studies" / "CT-3" / "study_0001.nii.gz")
    with pytest.raises(errors.ManifestError, match="patient 'study_0001' of hospital 'mosmed': two scans"):
        read_collection(mosmed, config_of("mosmed"))


def test_a_table_deals_the_patients_of_any_collection_to_hospitals(mosmed):
    rows = [f"study_{number:04d},{'east' if number % 2 else 'west'}" for number in range(1, 7)]
    (mosmed / "sites.csv").write_text("\n".join(["patient,hospital", *rows]))
    found = read_collection(mosmed, config_of("mosmed", table="sites.csv"))
    assert [entry.hospital for entry in found.entries] == ["east", "west"] * 3


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
def test_a_bad_table_is_named_with_its_line(tmp_path, rows, message):
    cc19 = write_cc19(tmp_path / "cc19")
    (cc19 / "table.csv").write_text(rows)
    with pytest.raises(errors.ManifestError, match=message):
        read_collection(cc19, config_of("cc-19", table="table.csv"))
