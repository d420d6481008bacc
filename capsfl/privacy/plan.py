"""One object decides both who takes part and what that costs, so the two cannot drift apart."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jax import Array
from jax.typing import ArrayLike

from capsfl.privacy import accounting, calibration, laplace
from capsfl.privacy.accounting import Account
from capsfl.privacy.config import PrivacyConfig as PrivacyConfig
from capsfl.privacy.config import bit_noise_of, check_privacy
from capsfl.privacy.correlated import BandedNoise, banded_noise
from capsfl.privacy.events import PrivacyError, SampledGaussian
from capsfl.privacy.patient_plan import PatientLoss, PatientPlan, Stage, patient_plan
from capsfl.privacy.sampling import Cohort, sample_all, sample_cyclic, sample_fixed, sample_poisson

NOT_ACCOUNTED = "not accounted: the clip norm is the median of the hospitals' own norms, which reveals them"
"""The remark of a statement under median clipping."""


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement(Account):
    """What a run guarantees its hospitals or patients; an epsilon of None means that nothing bounds it.

    Under unit `patient` the epsilon is the largest of all hospitals, `cohort` and `truncation` count the patients of
    a local step, and `patients` says what each hospital's have lost.
    """

    clip_norm: float
    patients: tuple[PatientLoss, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the statement as a flat dictionary of JSON scalars but for `patients`, a list of such."""
        row = asdict(self)
        row["patients"] = list(row["patients"])
        return row


@dataclass(frozen=True)
class PrivacyPlan:
    """The sampler, the mechanism and the accountant of a run, checked against each other.

    Guarantee: (epsilon, delta) differential privacy of all released models together, under the unit and relation and
    at the epsilon of `statement(rounds)`. Build it with `PrivacyPlan.build`; it hashes, so it serves as a static
    argument.

    Attributes:
        config: the `privacy` section.
        mechanism: of a round over hospitals; without noise under unit `patient`.
        patients: of the local steps, under unit `patient`.
        stages: the tasks of the run, where they are known.
        correlated: the banded noise, where it was chosen.
    """

    config: PrivacyConfig
    mechanism: SampledGaussian
    patients: PatientPlan | None = None
    stages: tuple[Stage, ...] = ()
    correlated: BandedNoise | None = None

    @classmethod
    def build(
        cls, config: PrivacyConfig, *, num_hospitals: int, rounds: int = 100, stages: Sequence[Stage] = ()
    ) -> "PrivacyPlan":
        """Returns the plan of a configuration for H hospitals.

        Args:
            config: The `privacy` section.
            num_hospitals: H.
            rounds: Without `stages`, those that an automatic Poisson cap is chosen for and banded noise is made for.
            stages: The tasks of the run, in order; their rounds then count. Unit `patient` needs their patients too.

        Raises:
            PrivacyError: The configuration contradicts itself or H, or an extra that it needs is not installed; the
                message starts with the dotted field.
        """
        cohort = num_hospitals if config.cohort is None else config.cohort
        noise = config.noise_multiplier if config.unit == "hospital" else 0.0
        try:
            mechanism = SampledGaussian(config.sampler, num_hospitals, cohort, noise, config.truncation)
            check_privacy(config, expected_cohort=cohort, groups=mechanism.groups)
            total = sum(stage.rounds for stage in stages) or rounds
            mechanism = accounting.resolve_truncation(mechanism, rounds=total, delta=config.delta)
            patients = patient_plan(config, stages) if config.unit == "patient" else None
            longest = max((stage.rounds for stage in stages), default=rounds)
            correlated = _correlated(config, mechanism, longest) if config.noise == "banded" else None
        except PrivacyError as error:
            raise error.under("privacy") from None
        return cls(config, mechanism, patients, tuple(stages), correlated)

    @property
    def num_slots(self) -> int:
        """The static size of a cohort: the cap for `poisson`, m for `fixed` and `cyclic`, H for `all`."""
        return self.mechanism.num_slots

    @property
    def expected_cohort(self) -> float:
        """m, the divisor of the mean: fixed and public, never the realised cohort."""
        return float(self.mechanism.cohort)

    def sample(self, *, key: Array, number: ArrayLike = 0) -> Cohort:
        """Returns one round's cohort: indices `(num_slots,)` int32 and mask `(num_slots,)` bool.

        Args:
            key: used for nothing else, new in every round.
            number: rounds of the run before this one, those of earlier tasks included; for `cyclic`.
        """
        hospitals, cohort = self.mechanism.hospitals, self.mechanism.cohort
        if self.mechanism.sampler == "all":
            return sample_all(num_hospitals=hospitals)
        if self.mechanism.sampler == "fixed":
            return sample_fixed(key=key, num_hospitals=hospitals, cohort=cohort)
        if self.mechanism.sampler == "cyclic":
            return sample_cyclic(number=number, num_hospitals=hospitals, cohort=cohort)
        return sample_poisson(key=key, num_hospitals=hospitals, cohort=cohort, truncation=self.num_slots)

    def stage(self, task: str) -> Stage:
        """Returns a task of the run by its name."""
        return next(stage for stage in self.stages if stage.task == task)

    def rounds_before(self, task: str) -> int:
        """Returns the rounds of the run's tasks before this one; 0 where the tasks are not known."""
        names = [stage.task for stage in self.stages]
        return sum(stage.rounds for stage in self.stages[: names.index(task)]) if task in names else 0

    @property
    def noises_sum(self) -> bool:
        """Whether the guarantee rests on noise that the server adds to a sum of clipped updates."""
        return self.config.unit == "hospital" and self.config.noise_multiplier > 0

    @property
    def sum_clip_norm(self) -> float:
        """S of a hospital's whole update; as good as unbounded under unit `patient`, which clips gradients."""
        return self.config.clip_norm if self.config.unit == "hospital" else UNBOUNDED

    @property
    def sum_multiplier(self) -> float:
        """z of the noise on the sum of updates before quantile clipping is charged; 0 under unit `patient`."""
        return self.mechanism.noise_multiplier

    @property
    def bit_noise(self) -> float:
        """Standard deviation of the noise on quantile clipping's bits; 0 for the other clippings."""
        if self.config.clipping != "quantile":
            return 0.0
        return bit_noise_of(self.config, expected_cohort=self.expected_cohort)

    @property
    def update_multiplier(self) -> float:
        """The noise multiplier of the updates: z, or more where quantile clipping pays for its bits out of z."""
        multiplier = self.sum_multiplier
        if self.config.clipping != "quantile" or multiplier == 0:
            return multiplier
        # In Python, for a plan is read while a round is traced; the same as `adaptive.update_multiplier`.
        return multiplier / math.sqrt(1 - (multiplier / (2 * self.bit_noise)) ** 2)

    @property
    def accounted(self) -> bool:
        """Whether an epsilon can be stated at all: not for a median of norms, which reveals them."""
        return self.config.clipping != "median"

    def epsilon(self, rounds: int) -> float | None:
        """Returns the epsilon of `rounds` rounds at the configured delta, or None when nothing bounds it.

        Under unit `patient` the largest of all hospitals.
        """
        if not self.accounted:
            return None
        if self.patients is not None:
            return self.patients.worst(rounds).epsilon
        if self.config.local_epsilon is not None:
            return laplace.laplace_epsilon(self.config.local_epsilon, rounds=rounds)
        figure = accounting.epsilon(self.mechanism, rounds=rounds, delta=self.config.delta)
        return figure if math.isfinite(figure) else None

    def epsilon_curve(self, rounds: int) -> tuple[float | None, ...]:
        """Returns the epsilon after each of the rounds 1 to `rounds`."""
        return tuple(self.epsilon(count) for count in range(1, rounds + 1))

    def max_rounds(self, budget: float) -> int:
        """Returns the most rounds whose epsilon stays at or below `budget`; 0 when not even one does.

        Under unit `patient` at most the rounds of all stages.
        """
        if not self.accounted:
            return 0
        if self.patients is not None:
            return self.patients.max_rounds(budget)
        if self.config.local_epsilon is not None:
            return min(math.floor(budget / self.config.local_epsilon), calibration.MOST_ROUNDS)
        return calibration.max_rounds(self.mechanism, target_epsilon=budget, delta=self.config.delta)

    def statement(self, rounds: int) -> PrivacyStatement:
        """Returns the guarantee after `rounds` rounds, with relation, unit and accountant."""
        losses: tuple[PatientLoss, ...] = ()
        if self.patients is not None:
            account, losses = self.patients.account(rounds), self.patients.losses(rounds)
        elif self.config.local_epsilon is not None:
            account = laplace.laplace_account(self.mechanism, local_epsilon=self.config.local_epsilon, rounds=rounds)
        else:
            account = accounting.account(self.mechanism, rounds=rounds, delta=self.config.delta)
        if not self.accounted:
            account = replace(account, epsilon=None, beside_epsilon=None, remark=NOT_ACCOUNTED)
        return PrivacyStatement(**asdict(account), clip_norm=self.config.clip_norm, patients=losses)

    @property
    def delta(self) -> float:
        """The delta of every epsilon: as configured, 0 for Laplace noise."""
        return 0.0 if self.config.local_epsilon is not None else self.config.delta

    def caution(self) -> str:
        """Returns what to warn of before training, with the dotted field; empty when there is nothing."""
        if self.patients is not None:
            remark = self.patients.caution()
        else:
            hospitals = self.mechanism.hospitals
            remark = (
                f"should stay well below 1/{hospitals}, one over the hospitals" if self.delta * hospitals >= 1 else ""
            )
        noisy = self.config.noise_multiplier > 0
        return f"privacy.delta = {self.config.delta:g}: {remark}" if remark and noisy else ""


UNBOUNDED = 3.0e38
"""A clip norm near the end of float32, above every norm whose squares are finite: it only drops what is not."""


def noise_for(
    target_epsilon: float,
    config: PrivacyConfig,
    *,
    num_hospitals: int,
    rounds: int,
    stages: Sequence[Stage] = (),
) -> float:
    """Returns the least noise multiplier, within 0.01 %, at which a run stays within a target epsilon.

    Args:
        target_epsilon: the budget.
        config: the `privacy` section; its own noise multiplier is ignored.
        num_hospitals: H.
        rounds: T of the whole run.
        stages: with their patients, for unit `patient`; `rounds` then counts for nothing.

    Raises:
        PrivacyError: no noise multiplier meets the target, or the mechanism takes none.
    """
    if config.mechanism == "laplace" or config.clipping == "median":
        field = "mechanism" if config.mechanism == "laplace" else "clipping"
        raise PrivacyError(f"privacy.{field}", getattr(config, field), "no noise multiplier sets its epsilon")
    if config.unit == "patient":
        return _patient_noise_for(target_epsilon, config, num_hospitals=num_hospitals, stages=stages)
    cohort = num_hospitals if config.cohort is None else config.cohort
    try:
        report = calibration.solve(
            target_epsilon,
            for_="noise_multiplier",
            hospitals=num_hospitals,
            cohort=cohort,
            rounds=rounds,
            delta=config.delta,
            sampler=config.sampler,
            truncation=config.truncation,
        )
    except PrivacyError as error:
        raise error.under("privacy") from None
    return report["noise_multiplier"]


def _patient_noise_for(
    target_epsilon: float, config: PrivacyConfig, *, num_hospitals: int, stages: Sequence[Stage]
) -> float:
    total = sum(stage.rounds for stage in stages)
    uncapped = tuple(max((count for _, count in stage.patients), default=1) for stage in stages)

    capped = config.patient_truncation is not None
    affordable = target_epsilon if capped else target_epsilon / (1 + accounting.TRUNCATION_COST)

    def plan_of(multiplier: float) -> PrivacyPlan:
        changed = config.model_copy(update={"noise_multiplier": multiplier, "target_epsilon": None})
        return PrivacyPlan.build(changed, num_hospitals=num_hospitals, stages=stages)

    def trial(multiplier: float) -> PatientPlan:
        # Without automatic caps, which are searched for last and whose cost is set aside.
        cap = config.patient_truncation
        caps = tuple(most if cap is None else min(cap, most) for most in uncapped)
        return PatientPlan(config.model_copy(update={"noise_multiplier": multiplier}), tuple(stages), caps)

    def excess(multiplier: float) -> float:
        figure = trial(multiplier).epsilon(exposed, total)
        return math.inf if figure is None else figure - affordable

    # Whoever loses most at one noise multiplier hardly ever changes with it; the loop below sees to when it does.
    exposed = (plan_of(1.0).patients or trial(1.0)).worst(total).hospital
    multiplier = calibration.least_noise(excess, target_epsilon)
    while (plan_of(multiplier).epsilon(total) or math.inf) > target_epsilon:
        multiplier *= 1 + accounting.TRUNCATION_COST
    return multiplier


def _correlated(config: PrivacyConfig, mechanism: SampledGaussian, rounds: int) -> BandedNoise:
    bands = min(mechanism.groups, rounds) if config.bands is None else config.bands
    if bands < 2:
        raise PrivacyError("noise", config.noise, 'correlates rounds, and there is one; use "independent"')
    try:
        # A participation of its own: rounds at least `groups >= bands` apart touch different columns of C, so k of
        # them cost what k independent releases cost, and z keeps its meaning.
        return banded_noise(rounds=rounds, bands=bands, participations=1)
    except ImportError as error:
        raise PrivacyError("noise", config.noise, str(error)) from error
