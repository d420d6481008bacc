"""Any tree of DICOM series: whose they are, which hospital and split a person is in, and what a series is called."""

from collections import Counter

import pytest
from collection_trees import config_of, facts, run

from capsfl.ct.collections import read_collection


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
