"""COVID-CT: its official split by patients, in a miniature of its layout and in the real collection."""

import csv
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from capsfl import cli
from capsfl.ct.collections import CollectionConfig, read_collection
from capsfl.ct.errors import ManifestError, WrongLayout
from capsfl.ct.index import read_collection_record
from capsfl.ct.ingest import ingest, read_index
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.pictures import read_pictures

LISTS = {"train": "train", "val": "validation", "test": "test"}
CONFIG = CollectionConfig(name="covid-ct", side=32)


def write_covid_ct(root, *, patients=12, seed=0):
    """Two slices a patient in the published layout, with names and modes as wild as the real ones."""
    rng = np.random.default_rng(seed)
    for folder, header in (
        ("COVID", ["File name", "Patient ID", "Age", "Captions"]),
        ("NonCOVID", ["", "image name", "patient id"]),
    ):
        images = root / "Images" / f"CT_{folder}"
        images.mkdir(parents=True)
        (root / "Data-split" / folder).mkdir(parents=True)
        (root / "Info").mkdir(exist_ok=True)
        lists, rows = defaultdict(list), []
        for patient in range(patients):
            for index in range(2):
                name = f"2020.03 p{patient}%{index}." + ("png" if folder == "COVID" or patient % 2 else "jpg")
                grey = rng.integers(0, 256, (40 + patient, 60 + patient), np.uint8)
                mode = "RGBA" if folder == "COVID" and patient % 2 else "RGB"
                Image.fromarray(grey).convert(mode).save(images / name)
                lists["train" if patient < patients - 6 else "val" if patient < patients - 3 else "test"].append(name)
                if folder == "COVID":
                    rows.append([name, f"Patient {patient}", "60", 'a "quoted", caption'])
                else:
                    rows.append([len(rows), name, f"crawled_patient_{patient}"])
        for word, names in lists.items():
            (root / "Data-split" / folder / f"{word}CT_{folder}.txt").write_text("\n".join(names) + "\n")
        with (root / "Info" / f"{folder}-CT-MetaInfo.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
    return root


@pytest.fixture
def tree(tmp_path):
    return write_covid_ct(tmp_path / "covid ct")


def by_patient(entries):
    """Splits and hospitals of every patient of every class."""
    found = defaultdict(set)
    for entry in entries:
        found[entry.label, entry.patient].add((entry.split, entry.hospital))
    return found


def test_patients_carry_the_official_split_and_all_their_slices(tree):
    found = read_collection(tree, CONFIG)
    assert found.classes == ("non-COVID", "COVID")
    assert found.notes == ()
    assert Counter((entry.label, entry.split) for entry in found.entries) == {
        (label, split): count for label in (0, 1) for split, count in (("train", 6), ("validation", 3), ("test", 3))
    }
    assert all(entry.kind == "pictures" and len(entry.files) == 2 for entry in found.entries)
    assert len({entry.patient for entry in found.entries}) == 24


def test_a_patient_whom_the_official_lists_part_goes_whole_to_the_test_set(tree):
    path = tree / "Data-split/COVID/trainCT_COVID.txt"
    names = path.read_text().splitlines()
    path.write_text("\n".join(names[1:]))
    with (tree / "Data-split/COVID/testCT_COVID.txt").open("a") as stream:
        stream.write(names[0])
    found = read_collection(tree, CONFIG)
    (note,) = found.notes
    assert "part 1 patients of CT_COVID" in note
    (entry,) = [entry for entry in found.entries if entry.label and entry.patient == "Patient-0"]
    assert entry.split == "test"
    assert len(entry.files) == 2


@pytest.mark.parametrize("rule", ["even", "dirichlet"])
def test_hospitals_share_no_patient_and_follow_the_seed(tree, rule):
    config = CONFIG.model_copy(update={"hospitals": rule, "count": 3, "alpha": 0.3})
    found = read_collection(tree, config)
    assert all(len(places) == 1 for places in by_patient(found.entries).values())
    assert {entry.hospital for entry in found.entries if entry.split == "train"} == {
        "hospital-1",
        "hospital-2",
        "hospital-3",
    }
    assert read_collection(tree, config) == found
    other = read_collection(tree, config.model_copy(update={"seed": 1}))
    assert [entry.hospital for entry in other.entries] != [entry.hospital for entry in found.entries]
    shares = Counter((entry.hospital, entry.label) for entry in found.entries)
    if rule == "even":
        assert set(shares.values()) == {4}
    else:
        assert max(shares.values()) >= 6  # a third would be 4


def test_a_split_may_be_drawn_or_left_to_the_study(tree):
    drawn = read_collection(tree, CONFIG.model_copy(update={"split": "drawn", "test_fraction": 0.25}))
    assert Counter((entry.label, entry.split) for entry in drawn.entries) == {
        (label, split): count for label in (0, 1) for split, count in (("train", 8), ("validation", 1), ("test", 3))
    }
    left = read_collection(tree, CONFIG.model_copy(update={"split": "study"}))
    assert {entry.split for entry in left.entries} == {None}


def test_more_hospitals_than_patients_are_refused(tree):
    with pytest.raises(ManifestError, match=r"collection\.count = 20: only 12 patients to train on"):
        read_collection(tree, CONFIG.model_copy(update={"hospitals": "even", "count": 20}))


def remove_list(tree):
    (tree / "Data-split/NonCOVID/valCT_NonCOVID.txt").unlink()


def remove_images(tree):
    for path in (tree / "Images/CT_COVID").iterdir():
        path.unlink()


def remove_info(tree):
    (tree / "Info/COVID-CT-MetaInfo.csv").unlink()


def rename_column(tree):
    path = tree / "Info/COVID-CT-MetaInfo.csv"
    path.write_text(path.read_text().replace("Patient ID", "Person"))


def forget_patient(tree):
    path = tree / "Info/NonCOVID-CT-MetaInfo.csv"
    path.write_text(path.read_text().replace("crawled_patient_3", ""))


def list_twice(tree):
    folder = tree / "Data-split/COVID"
    (folder / "valCT_COVID.txt").write_text((folder / "trainCT_COVID.txt").read_text())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_list, r"expected Data-split/NonCOVID/valCT_NonCOVID\.txt, found Data-split/, Images/, Info/"),
        (remove_images, r"expected the 24 pictures that the lists name in CT_COVID, found 0 \(no 2020.*p0%0\.png"),
        (remove_info, r"expected Info/COVID-CT-MetaInfo\.csv or COVID-CT-MetaInfo\.csv, found"),
        (rename_column, r"expected columns `File name` .* and `Patient ID`, found file name, person"),
        (forget_patient, r"2 pictures of CT_NonCOVID without a patient \(2020.*restore NonCOVID-CT-MetaInfo\.csv"),
        (list_twice, r"is in the train list too"),
    ],
)
def test_another_tree_is_refused_in_one_line(tree, damage, message):
    damage(tree)
    with pytest.raises(WrongLayout, match=message) as caught:
        read_collection(tree, CONFIG)
    assert "\n" not in str(caught.value)


def test_ingestion_stores_pictures_that_say_nothing_of_their_files(tree, tmp_path):
    out = tmp_path / "out"
    config = CONFIG.model_copy(update={"hospitals": "even", "count": 2})

    def run(config):
        return ingest(tree, out, config=VolumeConfig(), collection=config, processes=1, progress=False)

    report = run(config)
    assert (report.written, report.kept, report.failed) == (24, 0, ())
    assert report.index == read_index(out)
    assert {entry.kind for entry in report.index} == {"pictures"}
    pictures, attributes = read_pictures(report.index[0].path)
    assert (pictures.pixels.shape, pictures.pixels.dtype) == ((2, 32, 32), np.uint8)
    assert pictures.original_sizes.tolist() == [[40, 60], [40, 60]]
    assert attributes["label"] == 0
    record = read_collection_record(out)
    assert record is not None
    assert record["classes"] == ("non-COVID", "COVID")
    assert record["config"]["hospitals"] == "even"
    stored = "".join(path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    assert "2020.03" not in stored
    assert (run(config).written, run(config).kept) == (0, 24)
    assert run(config.model_copy(update={"side": 48})).written == 24


def test_the_command_ingests_a_collection(tree, tmp_path, capsys):
    words = ["--collection", "covid-ct", "--hospitals", "even", "--count", "2", "--side", "16", "--processes", "1"]
    with pytest.raises(SystemExit) as done:
        cli.main(["ingest", str(tree), str(tmp_path / "out"), *words])
    assert done.value.code == 0
    assert "24 written, 0 kept, 0 left out" in capsys.readouterr().out
    assert Counter(entry.hospital for entry in read_index(tmp_path / "out")) == {"hospital-1": 12, "hospital-2": 12}


def test_the_real_collection_is_what_its_authors_counted(shared_data):
    root = shared_data / "covid-ct"
    found = read_collection(root, CollectionConfig(name="covid-ct", hospitals="even", count=3))
    slices = Counter()
    for entry in found.entries:
        slices[entry.label, entry.split] += len(entry.files)
    assert slices == {
        (1, "train"): 191, (1, "validation"): 60, (1, "test"): 98,
        (0, "train"): 234, (0, "validation"): 58, (0, "test"): 105,
    }  # fmt: skip
    assert Counter(entry.label for entry in found.entries) == {1: 213, 0: 171}
    # The official lists part no patient, but two slices stand in both classes.
    assert found.notes == (
        "Patient-195 (COVID) and crawled_patient_71 (non-COVID) share a slice; leave one out",
        "Patient-196 (COVID) and crawled_patient_71 (non-COVID) share a slice; leave one out",
    )
    assert all(len(places) == 1 for places in by_patient(found.entries).values())
    assert len({path for entry in found.entries for path in entry.files}) == 746
    for split in ("train", "validation", "test"):
        for label in (0, 1):
            counts = Counter(e.hospital for e in found.entries if (e.split, e.label) == (split, label))
            assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 3
