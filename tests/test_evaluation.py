"""What is said of a classifier beside its controls, with classifiers whose answers are known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from capsfl.config import ClassificationStage, SegmentationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.ct.pictures import PictureSet
from capsfl.evaluation import Controls, Images, classify, results, score_controls
from capsfl.learning.patients import Patient
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan
from capsfl.study import Split

NOTHING = np.empty((0, 0, 0), np.float32)


def pictured(number: int, *, split: str, classes: int = 2, height: int = 100) -> Patient:
    """A patient of one picture, whose first pixel is the label and whose second is the scanner."""
    label, scanner = number % classes, number // classes % 2
    pixels = np.random.default_rng(number).integers(0, 255, (2, 64, 64)).astype(np.uint8)
    pixels[:, :4, :4], pixels[:, :4, 8:12] = 255 * label // (classes - 1), 255 * scanner
    pixels[:, 4:8, :4], pixels[:, 4:8, 8:12] = 255 - pixels[:, :4, :4], 255 - pixels[:, :4, 8:12]  # equally bright
    pictures = PictureSet(pixels, np.array([[height, 200]] * 2))
    name = f"{split}-{number}"
    return Patient(
        name, f"hospital-{scanner}", f"scanner-{scanner}", label, NOTHING, NOTHING > 0, None, (1.0, 1.0, 1.0),
        split, pictures,
    )  # fmt: skip


def split_of(classes: int = 2) -> Split:
    parts = (("train", 24), ("validation", 12), ("test", 24))
    return Split(*(tuple(pictured(n, split=part, classes=classes) for n in range(count)) for part, count in parts))


class Reader:
    """A classifier that reads the pixels named; stands for a trained network."""

    def __init__(self, config: ClassificationStage, *, sees_scanner: bool) -> None:
        self.config, self._sees_scanner = config, sees_scanner

    def probabilities(self, parameters: Any, images: np.ndarray) -> np.ndarray:
        classes = self.config.num_classes
        distance = np.abs(images[:, 1, 1, 0][:, None] * (classes - 1) - np.arange(classes)[None])
        return np.exp(-4 * distance) / np.exp(-4 * distance).sum(axis=1, keepdims=True)

    def features(self, parameters: Any, images: np.ndarray) -> np.ndarray:
        noise = images[:, 20, 20:24, 0]
        return np.concatenate([noise, images[:, 1, 9:10, 0]], axis=1) if self._sees_scanner else noise

    def judge(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.mean(axis=0)


def found_by(config: StudyConfig, split: Split, *, sees_scanner: bool = True, controls: Controls | None = None) -> Any:
    stage = config.classification
    assert stage is not None
    reader: Any = Reader(stage, sees_scanner=sees_scanner)
    classified = classify(reader, {"w": np.zeros((3, 4))}, {}, Images(stage, None), split, probe=True)
    statement = PrivacyPlan.build(PrivacyConfig(clip_norm=1.0), num_hospitals=2, stages=()).statement(0)
    return results(split, None, classified, controls or score_controls(split, config), config, statement)


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return StudyConfig(phantom=PhantomConfig(), classification=ClassificationStage())


def test_pictures_are_judged_beside_chance_and_beside_what_their_files_give_away(config: StudyConfig):
    table = found_by(config, split_of())
    assert "segmentation" not in table
    found = table["classification"]
    assert found["overall"]["auc"] == 1
    assert found["overall"]["brier"] < 0.01
    assert found["parameters"] == 12
    assert found["network"] == "capsnet"
    assert list(found["controls"]) == ["always positive", "permuted labels", "size and sharpness"]
    assert 0.2 < found["controls"]["size and sharpness"]["auc"] < 0.8
    assert found["controls"]["size and sharpness"]["brier"] > 0.1


def test_files_of_another_size_in_one_class_are_told_by_the_leak_row(config: StudyConfig):
    split = Split(
        *(
            tuple(pictured(n, split=p[0].split or "", height=100 + 30 * (n % 2)) for n in range(len(p)))
            for p in split_of()
        )
    )
    leak = found_by(config, split)["classification"]["controls"]["size and sharpness"]
    assert leak["auc"] == 1
    assert leak["auc_low"] > 0.6


def test_the_probe_tells_the_scanner_only_where_the_features_do(config: StudyConfig):
    split = split_of()
    told = found_by(config, split)["classification"]["scanner"]
    assert (told["of"], told["balanced_accuracy"], told["chance"], told["patients"]) == ("scanner", 1.0, 0.5, 24)
    blind = found_by(config, split, sees_scanner=False)["classification"]["scanner"]
    assert blind["balanced_accuracy_low"] < 0.5 < blind["balanced_accuracy_high"]


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_are_drawn_by_person(classes: int):
    """Every test scan twice is no further evidence where the two are one person's."""
    config = StudyConfig(phantom=PhantomConfig(), classification=ClassificationStage(classes=classes))
    split = split_of(classes=classes)
    # Two thirds are told wrongly or not at all, so that there is something to be unsure of.
    test = [replace(p, label=(p.label or 0) if n % 3 else n // 3 % classes) for n, p in enumerate(split.test)]
    again = [replace(p, name=f"{p.name}-again", person=p.name) for p in test]
    widths = {}
    for who, first in (("one", test), ("two", test), ("alone", test)):
        second = {"one": again, "two": [replace(p, person=None) for p in again], "alone": []}[who]
        first = [replace(p, person=p.name) for p in first]
        found = found_by(config, split._replace(test=(*first, *second)))["classification"]
        rows = (found["overall"], found["scanner"], *found["hospitals"].values())
        names = ("auc", "balanced_accuracy", "auc", "auc")
        widths[who] = [row[f"{name}_high"] - row[f"{name}_low"] for row, name in zip(rows, names, strict=True)]
    assert widths["one"] == pytest.approx(widths["alone"], rel=0.2)
    assert widths["two"][0] < 0.85 * widths["one"][0]
    assert widths["two"][2] < 0.85 * widths["one"][2]


def test_three_classes_have_a_row_each_and_their_own_controls():
    config = StudyConfig(phantom=PhantomConfig(), classification=ClassificationStage(classes=3))
    found = found_by(config, split_of(classes=3))["classification"]
    assert found["overall"]["auc"] == 1
    assert [row["sensitivity"] for row in found["overall"]["classes"]] == [1, 1, 1]
    assert found["controls"]["always positive"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert len(found["controls"]["size and sharpness"]["classes"]) == 3
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in found["scores"])
    assert found["hospitals"].keys() == {"hospital-0", "hospital-1"}


def test_volumes_without_a_segmenter_keep_the_dense_lung_and_have_no_threshold(config: StudyConfig):
    def patient(number: int, split: str) -> Patient:
        z, y, x = np.indices((16, 48, 64))
        body = ((y - 24) / 22) ** 2 + ((x - 32) / 30) ** 2 < 1
        hu = np.where(body, 40.0, -1000.0).astype(np.float32)
        for middle in (20, 44):
            hu[((y - 24) / 15) ** 2 + ((x - middle) / 9) ** 2 < 1] = -850
        hu[(z < 4 * (number % 2)) & (hu == -850)] = -400
        return Patient(f"{split}-{number}", "A", "", number % 2, hu, body, None, (5.0, 5.0, 5.0), split)

    parts = (("train", 2), ("validation", 2), ("test", 4))
    split = Split(*(tuple(patient(n, part) for n in range(count)) for part, count in parts))
    controls = score_controls(split, config)
    assert controls.segmentation is None
    assert list(controls.classification) == ["dense lung fraction"]
    dense = controls.classification["dense lung fraction"]
    assert [dense.probabilities[p.key][1] > 0.2 for p in split.test] == [False, True, False, True]
    both = config.model_copy(update={"segmentation": SegmentationStage()})
    assert score_controls(split, both).segmentation is not None
    three = config.model_copy(update={"classification": ClassificationStage(classes=3)})
    row = score_controls(split, three).classification["dense lung fraction"].probabilities
    assert all(found.shape == (3,) for found in row.values())
