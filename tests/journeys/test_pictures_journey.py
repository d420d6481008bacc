"""A study of pictures with a classifier alone: two networks on one split, their page, their ledgers."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capsfl.audit import audit_study
from capsfl.learning.classification import ClassificationConfig
from capsfl.ledger.chain import Ledger
from capsfl.ledger.verify import Status
from capsfl.study import load_study_config
from capsfl.sweeps.problems import StudyProblem, build

pytestmark = pytest.mark.journey

STUDY = """
out = "{out}"
seed = 1
jobs = 1

[devices]
chunk = 1

[data]
source = "{source}"

[classification]
image_size = 24
classes = 3
rounds = 1
top_slices = 1
local = {{ optimizer = "adam", learning_rate = 0.003, batch_size = 4 }}

[classification.model]
image_size = 24
conv_channels = 4
conv_kernel = 5
conv_stride = 2
primary_capsules = 2
primary_dim = 4
primary_kernel = 5
digit_dim = 4
reconstruction = false

[privacy]
clip_norm = 10.0

[[arms]]

[[arms]]
name = "efficient"

[arms.model]
name = "efficient_capsnet"
norm = "batch"
image_size = 24
conv_channels = [4, 4, 4, 8]
primary_dim = 4
digit_dim = 4
reconstruction = false

[[arms]]
name = "permuted"
labels = "permuted"

[[arms]]
name = "leave-one-out"
partition = "leave-one-out"
"""


@pytest.fixture(scope="session")
def pictured(once: Callable[..., Path], capsfl: Callable[..., object]) -> Path:
    """Three classes of bright, middling and dark pictures in two hospitals, trained on by two networks."""

    def make(place: Path) -> None:
        place.mkdir(parents=True)
        generator = np.random.default_rng(0)
        rows = []
        for number in range(24):
            label, hospital = number % 3, "AB"[number // 3 % 2]
            split = "train" if number < 12 else "validation" if number < 18 else "test"
            for copy in range(1 + number % 2):
                grey = generator.integers(0, 60, (90, 70 + number)) + 90 * label
                Image.fromarray(grey.astype(np.uint8)).save(place / f"{number}-{copy}.png")
                rows.append([f"P{number:02d}", hospital, f"{number}-{copy}.png", label, split])
        with (place / "manifest.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["patient", "hospital", "image", "label", "split"], *rows])
        (place / "study.toml").write_text(STUDY.format(out=place / "run", source=place / "manifest.csv"))
        capsfl("train", place / "study.toml")

    return once("pictured", make) / "run"


def test_two_networks_are_judged_on_one_split_beside_the_same_controls(pictured: Path):
    tables = [json.loads((pictured / arm / "results.json").read_text()) for arm in ("federated", "efficient")]
    assert all("segmentation" not in table for table in tables)
    own, other = (table["classification"] for table in tables)
    assert (own["network"], other["network"]) == ("capsnet", "efficient_capsnet")
    assert 0 < other["parameters"] != own["parameters"]
    patients = [(row["patient"], row["label"]) for row in own["scores"]]
    assert sorted(patients) == [(f"P{number}", number % 3) for number in range(18, 24)]
    assert patients == [(row["patient"], row["label"]) for row in other["scores"]]
    assert own["controls"]["size and sharpness"] == other["controls"]["size and sharpness"]
    assert own["controls"]["always positive"]["auc"] == 0.5
    assert own["scanner"]["of"] == "hospital"


def test_the_page_shows_every_network_its_cost_and_its_classes(pictured: Path):
    page = (pictured / "report.html").read_text()
    for words in (
        "size and sharpness",
        "AUC against the rest",
        "What the networks cost",
        "efficient",
        "permuted labels",
    ):
        assert words in page
    assert "dense lung fraction" not in page
    assert "Segmentation</h2>" not in page


def test_a_hospital_that_was_left_out_is_judged_by_the_others_alone(pictured: Path):
    table = json.loads((pictured / "leave-one-out/results.json").read_text())
    assert (table["partition"], table["members"].keys()) == ("leave-one-out", {"A", "B"})
    federated = json.loads((pictured / "federated/results.json").read_text())["classification"]["scores"]
    for name, other in (("A", "B"), ("B", "A")):
        judged = table["members"][name]["classification"]["scores"]
        assert {row["patient"] for row in judged} == {row["patient"] for row in federated if row["hospital"] == name}
        log = pictured / "leave-one-out" / name / "metrics.jsonl"
        rounds = [json.loads(line) for line in log.read_text().splitlines()]
        assert {(tuple(row["cohort"]), row["member"], *row["hospitals"]) for row in rounds} == {((other,), name, other)}
    assert "AUC of a hospital that was not there" in (pictured / "report.html").read_text()


def test_new_pictures_are_judged_as_the_test_patients_were(pictured: Path, tmp_path: Path, here):
    """The test patients' pictures as if they were new: every probability is the one that the study scored."""
    source = pictured.parent
    with (source / "manifest.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    for row in rows:
        folder = tmp_path / "inbox" / row["patient"]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / row["image"], folder)
    shutil.copy(source / rows[0]["image"], tmp_path / "inbox" / "alone.png")
    (tmp_path / "inbox" / "P18" / "slice.dcm").write_bytes(b"a slice of a scan")
    out = tmp_path / "out"
    answer = here("predict", pictured, tmp_path / "inbox", "--out", out, expect=3)
    assert "not for clinical use" in answer.out
    assert "left out P18-other-files: " in answer.out
    scores = json.loads((pictured / "federated/results.json").read_text())["classification"]["scores"]
    judged = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/prediction.json")}
    assert judged.keys() == {"alone", *(row["patient"] for row in scores)}
    for row in scores:
        assert judged[row["patient"]]["class_probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    assert len({len(row["pictures"]) for row in judged.values()}) == 2, "patients with one picture and with two"
    with Ledger.open(pictured / "federated" / "ledger") as ledger:
        head, last = ledger.blocks()[-1].hash().hex(), ledger.rounds()[-1]
    page = (out / "predictions.html").read_text()
    for row in judged.values():
        assert row["ledger_head"] == head
        assert row["models"]["classification"]["digest"] == last.parameters_digest
    for words in (head, last.parameters_digest, "not for clinical use", "7 patients, by pictures", "class 2"):
        assert words in page
    assert page.count("data:image/jpeg;base64,") == 7


def test_it_does_not_answer_for_scans(pictured: Path, phantom: Path, tmp_path: Path, refused):
    for place, words in (
        (phantom / "hospital-A" / "A-002", "no picture among"),
        (phantom / "masks" / "A-002.nii.gz", "not a picture"),
    ):
        assert place.exists()
        message = refused("predict", pictured, place, "--out", tmp_path / "out")
        assert message.startswith(f"{place}: {words}")
        assert "trained on pictures, whose grey values are not Hounsfield units, so it cannot judge CT scans" in message
    assert "series = 1: of CT scans" in refused("predict", pictured, phantom, "--series", "1")
    assert not list(tmp_path.iterdir())


def test_any_arm_can_judge_and_be_taken_away(pictured: Path, tmp_path: Path, here, refused):
    picture = pictured.parent / "20-0.png"
    probabilities = {}
    for arm in ("efficient", "permuted", "leave-one-out/A"):
        here("predict", pictured, picture, "--out", tmp_path / "out", "--arm", arm)
        (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/prediction.json"))
        shutil.rmtree(tmp_path / "out")
        assert record["arm"] == arm
        probabilities[arm] = tuple(record["class_probabilities"])
    assert len(set(probabilities.values())) == 3
    here("export", pictured, tmp_path / "models", "--arm", "efficient")
    assert "(efficient_capsnet)" in (tmp_path / "models" / "MODEL_CARD.md").read_text()
    arms = "federated, efficient, permuted, leave-one-out/A, leave-one-out/B"
    assert refused("export", pictured, tmp_path / "other", "--arm", "x") == f"arm = x: {pictured} has {arms}"
    assert f"arm = local: {pictured} has {arms}" in refused("predict", pictured, picture, "--arm", "local")


def test_a_network_that_learnt_shuffled_labels_is_judged_by_the_true_ones(pictured: Path):
    own, other = (
        json.loads((pictured / arm / "results.json").read_text())["classification"] for arm in ("federated", "permuted")
    )
    assert [row["label"] for row in own["scores"]] == [row["label"] for row in other["scores"]]
    assert own["scores"] != other["scores"]
    page = (pictured / "report.html").read_text()
    assert "trained on shuffled labels" in page
    assert "federated against each other training" in page


def test_its_ledgers_verify(pictured: Path):
    found = audit_study(pictured)
    assert found.keys() == {"federated", "efficient", "permuted", "leave-one-out/A", "leave-one-out/B"}
    assert not [f for findings in found.values() for f in findings if f.status is Status.FAILED]


def test_its_stage_is_a_problem_of_a_sweep(pictured: Path):
    stage = load_study_config(pictured).classification
    assert stage is not None
    own = ClassificationConfig(**{field: getattr(stage, field) for field in ClassificationConfig.model_fields})
    built = build(StudyProblem(folder=str(pictured), stage="classification", classification=own))
    assert built.hospitals.names == ("A", "B")
    assert built.hospitals.records["image"].shape[2:] == (24, 24, 1)
