"""What patient-level privacy costs each hospital's patients, through all tasks of a run.

Every hospital has its own epsilon, because its own number of patients sets how often each of them is drawn; that
number is taken as public. The relation is adding or removing one patient of that hospital, with all of its slices
and in every task that learns from it. Where hospitals draw their own noise the guarantee holds against the
server and the other hospitals (in this simulation one root key draws all), and it does not depend on what the server
does with the updates: who is in a round, robust rules and control variates are free.

A hospital is accounted as if it took part in every round, however hospitals are drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from capsfl.privacy import accounting
from capsfl.privacy.calibration import largest
from capsfl.privacy.config import PrivacyConfig
from capsfl.privacy.events import PrivacyError, SampledGaussian
from capsfl.privacy.patients import steps_in_epoch

ACCOUNTANT = "PLD of the truncated Poisson-subsampled Gaussian over a hospital's patients, all local steps composed"
ACCOUNTANT_BESIDE = "RDP of the untruncated Poisson-subsampled Gaussian over a hospital's patients"


@dataclass(frozen=True)
class Stage:
    """The rounds of one task within a run.

    Attributes:
        task: its name.
        rounds: as configured; the last stage may be run for fewer or more.
        epochs: local epochs in a round.
        patients: under unit `patient`, name and number of patients of each hospital.
    """

    task: str
    rounds: int
    epochs: int = 1
    patients: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class PatientLoss:
    """What a run has cost the patients of one hospital; an epsilon of None means that nothing bounds it.

    Attributes:
        hospital: its name.
        patients: the most of its patients that a task learns from.
        steps: local steps so far, each drawing from them.
        epsilon: at the configured delta.
    """

    hospital: str
    patients: int
    steps: int
    epsilon: float | None


@dataclass(frozen=True)
class PatientPlan:
    """The sampler and the accountant of patient-level privacy; build it with `patient_plan`. It hashes.

    Attributes:
        config: S, z, m and delta.
        stages: the tasks of the run, in order.
        truncations: the slots of a local step in each stage, common to its hospitals.
    """

    config: PrivacyConfig
    stages: tuple[Stage, ...]
    truncations: tuple[int, ...]

    @property
    def expected_patients(self) -> int:
        """m, the expected number of patients in a local step."""
        assert self.config.expected_patients is not None  # PrivacyConfig without it is refused
        return self.config.expected_patients

    @property
    def hospitals(self) -> tuple[str, ...]:
        """Names of the hospitals that hold patients, in the order of the first stage that names them."""
        return tuple(dict.fromkeys(name for stage in self.stages for name, _ in stage.patients))

    def truncation(self, task: str) -> int:
        """Returns the slots of a local step of a task."""
        return self.truncations[self._index(task)]

    def epochs(self, task: str) -> int:
        """Returns the local epochs of a round of a task that are accounted."""
        return self.stages[self._index(task)].epochs

    def epsilon(self, hospital: str, rounds: int) -> float | None:
        """Returns the epsilon of a hospital's patients after `rounds` rounds of the run, or None when unbounded."""
        figure = accounting.epsilon_of_all(self._spent(hospital, rounds), delta=self.config.delta)
        return figure if math.isfinite(figure) else None

    def losses(self, rounds: int) -> tuple[PatientLoss, ...]:
        """Returns what `rounds` rounds of the run cost the patients of each hospital."""
        return _losses(self, rounds)

    def worst(self, rounds: int) -> PatientLoss:
        """Returns the loss of the hospital whose patients have lost most."""
        return max(self.losses(rounds), key=lambda loss: math.inf if loss.epsilon is None else loss.epsilon)

    def max_rounds(self, budget: float) -> int:
        """Returns the most of the configured rounds after which every hospital is within `budget`."""
        if self.config.noise_multiplier < accounting.LEAST_NOISE:
            return 0

        def fits(rounds: int) -> bool:
            figure = self.worst(rounds).epsilon
            return figure is not None and figure <= budget

        return largest(fits, most=sum(stage.rounds for stage in self.stages))

    def account(self, rounds: int) -> accounting.Account:
        """Returns the account of the hospital whose patients have lost most."""
        worst = self.worst(rounds)
        beside = accounting.beside_epsilon_of_all(self._spent(worst.hospital, rounds), delta=self.config.delta)
        remarks = []
        if len(self.hospitals) > 1:
            remarks.append(f"the largest epsilon of {len(self.hospitals)} hospitals, that of {worst.hospital}")
        if worst.epsilon is None:
            remarks = ["nothing bounds what a patient reveals"]
        elif worst.epsilon > accounting.MEANINGFUL_EPSILON:
            remarks.append(f"an epsilon above {accounting.MEANINGFUL_EPSILON} protects nobody")
        remarks += filter(None, [self.caution()])
        return accounting.Account(
            epsilon=worst.epsilon,
            delta=self.config.delta,
            relation="add_or_remove_one",
            unit="patient",
            accountant=ACCOUNTANT,
            library=accounting.LIBRARY,
            sampler="poisson",
            hospitals=len(self.hospitals),
            cohort=self.expected_patients,
            truncation=max(self.truncations),
            noise_multiplier=self.config.noise_multiplier,
            rounds=rounds,
            beside_epsilon=beside if math.isfinite(beside) else None,
            beside_relation="add_or_remove_one",
            beside_accountant=ACCOUNTANT_BESIDE,
            remark="; ".join(remarks),
        )

    def caution(self) -> str:
        """Returns what is wrong with delta, or nothing."""
        most = max(count for stage in self.stages for _, count in stage.patients)
        return f"delta should stay well below 1/{most}, one over the patients" if self.config.delta * most >= 1 else ""

    def _index(self, task: str) -> int:
        return next(index for index, stage in enumerate(self.stages) if stage.task == task)

    def _steps(self, hospital: str, rounds: int) -> tuple[tuple[int, int, int], ...]:
        """Per stage that has begun and that the hospital holds patients for: its index, their number, local steps."""
        found = []
        for index, stage in enumerate(self.stages):
            here = rounds if index == len(self.stages) - 1 else min(rounds, stage.rounds)
            rounds -= here
            count = dict(stage.patients).get(hospital, 0)
            if count and here:
                found.append((index, count, here * stage.epochs * steps_in_epoch(count, self.expected_patients)))
        return tuple(found)

    def _spent(self, hospital: str, rounds: int) -> tuple[tuple[SampledGaussian, int], ...]:
        parts = []
        for index, count, steps in self._steps(hospital, rounds):
            cap = min(self.truncations[index], count)
            mechanism = SampledGaussian("poisson", count, self.expected_patients, self.config.noise_multiplier, cap)
            parts.append((mechanism, steps))
        return tuple(parts)


@lru_cache(maxsize=1024)
def _losses(plan: PatientPlan, rounds: int) -> tuple[PatientLoss, ...]:
    found = []
    for hospital in plan.hospitals:
        steps = plan._steps(hospital, rounds)
        most = max(dict(stage.patients).get(hospital, 0) for stage in plan.stages)
        found.append(PatientLoss(hospital, most, sum(count for *_, count in steps), plan.epsilon(hospital, rounds)))
    return tuple(found)


def patient_plan(config: PrivacyConfig, stages: Sequence[Stage]) -> PatientPlan:
    """Returns the plan of a run whose hospitals hold these patients.

    An absent cap becomes the largest of those the hospitals of a stage need; each is accounted at the cap it runs
    under.

    Args:
        config: of unit `patient`.
        stages: the tasks, in order.

    Raises:
        PrivacyError: no patients are given, a hospital has fewer than a step expects, or the cap does not fit. The
            field is not yet dotted.
    """
    expected, truncations = config.expected_patients, []
    if expected is None or not stages or not all(stage.patients for stage in stages):
        raise PrivacyError("unit", config.unit, "needs the number of each hospital's patients, in every stage")
    for stage in stages:
        caps = [_cap(config, stage, name, count) for name, count in stage.patients]
        truncations.append(max(caps))
    return PatientPlan(config, tuple(stages), tuple(truncations))


def _cap(config: PrivacyConfig, stage: Stage, hospital: str, count: int) -> int:
    """The slots that a hospital's local step needs."""
    expected: Any = config.expected_patients
    if count < expected:
        remedy = (
            f"{hospital} has {count} patients for {stage.task}, fewer than a local step expects; lower it, or leave "
            "the hospital out"
        )
        raise PrivacyError("expected_patients", expected, remedy)
    if config.patient_truncation is not None and config.patient_truncation < expected:
        remedy = f"must be at least the expected patients ({expected})"
        raise PrivacyError("patient_truncation", config.patient_truncation, remedy)
    cap = None if config.patient_truncation is None else min(config.patient_truncation, count)
    mechanism = SampledGaussian("poisson", count, expected, config.noise_multiplier, cap)
    steps = stage.rounds * stage.epochs * steps_in_epoch(count, expected)
    return accounting.resolve_truncation(mechanism, rounds=steps, delta=config.delta).num_slots
