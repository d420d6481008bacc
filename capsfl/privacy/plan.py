"""One object decides both who takes part and what that costs, so the two cannot drift apart."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from jax import Array
from pydantic import Field

from capsfl.privacy import accounting, calibration
from capsfl.privacy.accounting import Account
from capsfl.privacy.events import PrivacyError, SampledGaussian, Sampler
from capsfl.privacy.sampling import Cohort, sample_all, sample_fixed, sample_poisson
from capsfl.settings import Settings


class PrivacyConfig(Settings):
    """Hospital-level differential privacy of the released model."""

    sampler: Sampler = "all"
    """How a round's cohort is drawn: `poisson`, `fixed` (without replacement) or `all`."""
    cohort: int | None = Field(default=None, ge=1)
    """m, the expected number of hospitals in a round; all hospitals when absent."""
    truncation: int | None = Field(default=None, ge=1)
    """The most hospitals a Poisson round takes; when absent, the smallest cap costing < 0.1 % of epsilon."""
    clip_norm: float = Field(gt=0)
    """S, the L2 norm a hospital's whole update is clipped to."""
    noise_multiplier: float = Field(default=0.0, ge=0)
    """z, the standard deviation of the noise on the SUM of updates divided by S; 0 trains without privacy."""
    delta: float = Field(default=1e-5, ge=accounting.SMALLEST_DELTA, lt=1)
    """The probability with which the epsilon bound may fail; well below 1 / hospitals."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """The privacy budget: training stops before a round that would exceed it."""
    noise_on: Literal["sum"] = "sum"
    """Noise is added to the sum, before the division by m; a sigma quoted on the mean is z = sigma m."""


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement(Account):
    """What a run guarantees its hospitals; an epsilon of None means that nothing bounds it."""

    clip_norm: float


@dataclass(frozen=True)
class PrivacyPlan:
    """The sampler, the mechanism and the accountant of a run, checked against each other.

    Guarantee: hospital-level (epsilon, delta) differential privacy of all released models together, under the
    relation and at the epsilon of `statement(rounds)`. Build it with `PrivacyPlan.build`; it hashes, so it
    serves as a static argument.
    """

    config: PrivacyConfig
    mechanism: SampledGaussian

    @classmethod
    def build(cls, config: PrivacyConfig, *, num_hospitals: int, rounds: int = 100) -> "PrivacyPlan":
        """Returns the plan of a configuration for H hospitals.

        Args:
            config: The `privacy` section.
            num_hospitals: H.
            rounds: The rounds an automatic Poisson cap is chosen for; it hardly depends on them.

        Raises:
            PrivacyError: The configuration contradicts itself or H; the message starts with the dotted field.
        """
        cohort = num_hospitals if config.cohort is None else config.cohort
        if config.target_epsilon is not None and config.noise_multiplier == 0:
            raise PrivacyError(
                "privacy.target_epsilon",
                config.target_epsilon,
                "no noise meets any budget; set privacy.noise_multiplier above 0, or leave the target out",
            )
        try:
            mechanism = SampledGaussian(
                config.sampler, num_hospitals, cohort, config.noise_multiplier, config.truncation
            )
            mechanism = accounting.resolve_truncation(mechanism, rounds=rounds, delta=config.delta)
        except PrivacyError as error:
            raise error.under("privacy") from None
        return cls(config, mechanism)

    @property
    def num_slots(self) -> int:
        """The static size of a cohort: the cap for `poisson`, m for `fixed`, H for `all`."""
        return self.mechanism.num_slots

    @property
    def expected_cohort(self) -> float:
        """m, the divisor of the mean: fixed and public, never the realised cohort."""
        return float(self.mechanism.cohort)

    def sample(self, *, key: Array) -> Cohort:
        """Returns one round's cohort: indices `(num_slots,)` int32 and mask `(num_slots,)` bool."""
        hospitals = self.mechanism.hospitals
        if self.mechanism.sampler == "all":
            return sample_all(num_hospitals=hospitals)
        if self.mechanism.sampler == "fixed":
            return sample_fixed(key=key, num_hospitals=hospitals, cohort=self.mechanism.cohort)
        return sample_poisson(key=key, num_hospitals=hospitals, cohort=self.mechanism.cohort, truncation=self.num_slots)

    def epsilon(self, rounds: int) -> float | None:
        """Returns the epsilon of `rounds` rounds at the configured delta, or None when nothing bounds it."""
        figure = accounting.epsilon(self.mechanism, rounds=rounds, delta=self.config.delta)
        return figure if math.isfinite(figure) else None

    def epsilon_curve(self, rounds: int) -> tuple[float | None, ...]:
        """Returns the epsilon after each of the rounds 1 to `rounds`."""
        return tuple(self.epsilon(count) for count in range(1, rounds + 1))

    def max_rounds(self, budget: float) -> int:
        """Returns the most rounds whose epsilon stays at or below `budget`; 0 when not even one does."""
        return calibration.max_rounds(self.mechanism, target_epsilon=budget, delta=self.config.delta)

    def statement(self, rounds: int) -> PrivacyStatement:
        """Returns the guarantee after `rounds` rounds, with relation, unit and accountant."""
        account = accounting.account(self.mechanism, rounds=rounds, delta=self.config.delta)
        return PrivacyStatement(**asdict(account), clip_norm=self.config.clip_norm)
