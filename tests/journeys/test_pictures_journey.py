"""A study of pictures with a classifier alone: two networks on one split, their page, their ledgers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capsfl.audit import audit_study
from capsfl.learning.classification import ClassificationConfig
from capsfl.ledger.verify import Status
from capsfl.predict.model import Model
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


def test_it_does_not_answer_for_scans(pictured: Path):
    with pytest.raises(ValueError, match=r"run: trained on pictures, whose grey values are not Hounsfield units"):
        Model(pictured)


def test_its_ledgers_verify(pictured: Path):
    found = audit_study(pictured)
    assert found.keys() == {"federated", "efficient", "leave-one-out/A", "leave-one-out/B"}
    assert not [f for findings in found.values() for f in findings if f.status is Status.FAILED]


def test_its_stage_is_a_problem_of_a_sweep(pictured: Path):
    stage = load_study_config(pictured).classification
    assert stage is not None
    own = ClassificationConfig(**{field: getattr(stage, field) for field in ClassificationConfig.model_fields})
    built = build(StudyProblem(folder=str(pictured), stage="classification", classification=own))
    assert built.hospitals.names == ("A", "B")
    assert built.hospitals.records["image"].shape[2:] == (24, 24, 1)
