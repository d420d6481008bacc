"""Who lies in which hospital's scanner: Table II's cohort, scaled to any number of hospitals and patients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from capsfl.ct.phantom.disease import Pattern
from capsfl.ct.phantom.scanners import SCANNERS, Scanner
from capsfl.settings import Settings

_TABLE_II = {"A1": 30, "A2": 10, "B3": 13, "B4": 7, "C5": 20, "C6": 9}


class PhantomConfig(Settings):
    """The phantom's cohort and acquisition."""

    hospitals: Annotated[int, Field(ge=1, le=len(ascii_uppercase))] = 3
    """Number of hospitals; beyond three, Table II's scanner pairs repeat."""
    patients: Annotated[int, Field(ge=1, le=100_000)] = 89
    """Number of patients over all hospitals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every patient and every scan."""
    matrix: Literal[128, 256, 512] = 512
    """Rows and columns of a slice."""
    slice_thickness_mm: Annotated[float, Field(ge=0.5, le=10)] = 5.0
    """Slice thickness and spacing."""
    positives_fraction: Annotated[float, Field(ge=0, le=1)] = 68 / 89
    """Fraction of patients with COVID pneumonia; 0 and 1 give one class only."""
    classes: Literal[2, 3] = 2
    """2: label 0 without pneumonia, 1 COVID. 3: 0 without, 1 another pneumonia, 2 COVID; the patients without COVID
    are halved between the first two."""

    @model_validator(mode="after")
    def _every_hospital_has_a_patient(self) -> "PhantomConfig":
        if self.patients < self.hospitals:
            raise ValueError(f"patients={self.patients} is fewer than hospitals={self.hospitals}; give each a patient")
        return self


@dataclass(frozen=True)
class Subject:
    """One patient of the cohort."""

    id: str
    hospital: str
    scanner: Scanner
    positive: bool
    """Whether the patient has pneumonia."""
    seed: int
    label: int
    pattern: Pattern = "covid"
    """Which pneumonia, if any."""


def apportion(total: int, weights: Sequence[float], *, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Share `total` out in proportion to `weights` within bounds, by largest remainders."""
    shares = np.asarray(weights, float) / sum(weights) * total
    counts = [min(max(int(share), a), b) for share, a, b in zip(shares, low, high, strict=True)]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        free = [i for i, n in enumerate(counts) if (n < high[i] if step > 0 else n > low[i])]
        counts[max(free, key=lambda i: step * (shares[i] - counts[i]))] += step
    return counts


def _spread(counts: Sequence[int]) -> list[int]:
    """Order items so that every prefix holds each kind in proportion, the rarest kinds first."""
    total, placed = sum(counts), [0] * len(counts)
    order = []
    for position in range(1, total + 1):
        kind = max(
            (k for k in range(len(counts)) if placed[k] < counts[k]),
            key=lambda k: (counts[k] * position / total - placed[k], -counts[k]),
        )
        placed[kind] += 1
        order.append(kind)
    return order


def _label_order(positives: int, count: int) -> list[bool]:
    """Labels whose every prefix is within one patient of the overall proportion, the rarer label first."""
    rare = min(positives, count - positives)
    ceilings = [-(-rare * k // count) for k in range(count + 1)]
    rarer_is_positive = positives * 2 < count
    return [(ceilings[k + 1] > ceilings[k]) == rarer_is_positive for k in range(count)]


def _hospital_scanners(index: int) -> tuple[Scanner, Scanner]:
    letter = ascii_uppercase[index]
    first, second = SCANNERS[2 * (index % 3) : 2 * (index % 3) + 2]
    return (
        replace(first, id=f"{letter}{2 * index + 1}", hospital=letter),
        replace(second, id=f"{letter}{2 * index + 2}", hospital=letter),
    )


def cohort(config: PhantomConfig) -> tuple[Subject, ...]:
    """Assign patients to hospitals, scanners and labels.

    Three hospitals and 89 patients give Table II: 30+10, 13+7 and 20+9 patients on six scanners, 68 of 89
    positive. Other sizes keep its proportions. A hospital with two patients or more has both labels; each
    scanner of a hospital sees the same fraction of positives to within a patient, so that the scanner does
    not give the label away; and any prefix of a hospital's patients is balanced like the whole. With three classes
    that holds for COVID against the rest, and the rest are halved in every hospital and on every scanner.
    """
    hospitals = range(config.hospitals)
    pairs = [_hospital_scanners(index) for index in hospitals]
    weights = [[_TABLE_II[SCANNERS[2 * (index % 3) + k].id] for k in (0, 1)] for index in hospitals]
    at_least = 2 if config.patients >= 2 * config.hospitals else 1
    sizes = apportion(
        config.patients, [sum(pair) for pair in weights],
        low=[at_least] * config.hospitals, high=[config.patients] * config.hospitals,
    )  # fmt: skip
    mixed = 0 < config.positives_fraction < 1
    low = [1 if mixed and size > 1 else 0 for size in sizes]
    high = [size - 1 if mixed and size > 1 else size for size in sizes]
    positives = min(max(round(config.positives_fraction * config.patients), sum(low)), sum(high))
    subjects: list[Subject] = []
    for index, (size, positive) in enumerate(zip(sizes, apportion(positives, sizes, low=low, high=high), strict=True)):
        per_scanner = apportion(size, weights[index], low=[0, 0], high=[size, size])
        of_positives = apportion(positive, per_scanner, low=[0, 0], high=per_scanner)
        of_negatives = [n - p for n, p in zip(per_scanner, of_positives, strict=True)]
        queues = {True: iter(_spread(of_positives)), False: iter(_spread(of_negatives))}
        for number, label in enumerate(_label_order(positive, size)):
            entropy = np.random.SeedSequence([config.seed, index, number])
            subjects.append(
                Subject(
                    id=f"{ascii_uppercase[index]}-{number + 1:03d}",
                    hospital=f"hospital-{ascii_uppercase[index]}",
                    scanner=pairs[index][next(queues[label])],
                    positive=label,
                    seed=int(entropy.generate_state(1, np.uint64)[0]),
                    label=int(label),
                )
            )
    return tuple(subjects) if config.classes == 2 else _with_other_pneumonia(subjects)


def _with_other_pneumonia(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """Give every second patient without COVID another pneumonia: in every hospital, and on each of its scanners."""
    negatives = sorted((s for s in subjects if not s.positive), key=lambda s: (s.hospital, s.scanner.id, s.id))
    sick = {subject.id for subject in negatives[::2]}
    return tuple(
        replace(subject, label=2)
        if subject.positive
        else replace(subject, label=1, positive=True, pattern="pneumonia")
        if subject.id in sick
        else subject
        for subject in subjects
    )
