"""Labels dealt anew: they say nothing about scans, and nothing else changes."""

import numpy as np
import pytest

from capsfl.learning.patients import Patient, permute_labels

HU = np.zeros((1, 1, 1), np.float32)


def patient(number: int, hospital: str, label: int | None, person: str | None = None) -> Patient:
    return Patient(f"P{number}", hospital, "", label, HU, HU > 0, None, (1.0, 1.0, 1.0), person=person)


@pytest.fixture
def patients() -> tuple[Patient, ...]:
    found = [patient(n, "AB"[n % 2], int(n % 6 < 2)) for n in range(60)]
    found += [patient(n, "A", 1, person="twice") for n in (60, 61)]
    return (*found, patient(62, "B", None))


def test_every_hospital_keeps_its_classes_and_every_person_one_label(patients):
    dealt = permute_labels(patients, seed=3)
    assert [p.key for p in dealt] == [p.key for p in patients]
    for hospital in "AB":
        # Two scans of one person may turn from two of one class into two of another.
        people = {p.whose: p.label for p in patients if p.hospital == hospital and p.label is not None}
        now = {p.whose: p.label for p in dealt if p.hospital == hospital and p.label is not None}
        assert sorted(people.values()) == sorted(now.values())
    assert dealt[60].label == dealt[61].label
    assert dealt[62].label is None
    assert all(a.hu is b.hu for a, b in zip(patients, dealt, strict=True))


def test_the_new_labels_do_not_follow_the_old_ones_and_repeat(patients):
    before = np.array([p.label for p in patients[:60]])
    agreements = []
    for seed in range(40):
        after = np.array([p.label for p in permute_labels(patients, seed=seed)[:60]])
        agreements.append(np.mean(after == before))
    chance = np.mean(before) ** 2 + np.mean(1 - before) ** 2
    assert np.mean(agreements) == pytest.approx(chance, abs=0.04)
    assert permute_labels(patients, seed=1) == permute_labels(patients, seed=1)
