"""One object decides both who takes part and what that costs, so the two cannot drift apart."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

from jax import Array
from pydantic import Field

from capsfl.privacy import accounting, adaptive, calibration, laplace
from capsfl.privacy.accounting import Account
from capsfl.privacy.events import PrivacyError, SampledGaussian, Sampler
from capsfl.privacy.sampling import Cohort, sample_all, sample_fixed, sample_poisson
from capsfl.settings import Settings

NOT_ACCOUNTED = "not accounted: the clip norm is the median of the hospitals' own norms, which reveals them"
"""The remark of a statement under median clipping."""


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
    clipping: Literal["fixed", "quantile", "median"] = "fixed"
    """Where S comes from: `fixed` is `clip_norm`; `quantile` starts there and follows a private quantile of the
    update norms (Andrew et al. 2021), its noise charged to z; `median` is Geyer's, whose epsilon is not accounted."""
    target_quantile: float = Field(default=0.5, gt=0, lt=1)
    """The fraction of hospitals whose update quantile clipping should leave whole."""
    clip_learning_rate: float = Field(default=0.2, gt=0)
    """Step of quantile clipping, in the exponent of S."""
    bit_noise: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise on quantile clipping's sum of bits, above z / 2; max(m / 20, z) when absent."""
    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    """`gaussian` noise on the sum, or `laplace` noise on every hospital's own update (local privacy)."""
    local_epsilon: float | None = Field(default=None, gt=0)
    """The epsilon of one hospital's one Laplace release."""
    clip_kind: Literal["l2", "l1"] = "l2"
    """The norm `clip_norm` bounds: `l2` for Gaussian noise, `l1` for Laplace."""


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
        try:
            _check_mechanism(config)
            _check_clipping(config, expected_cohort=cohort)
        except PrivacyError as error:
            raise error.under("privacy") from None
        if config.mechanism == "gaussian" and config.target_epsilon is not None and config.noise_multiplier == 0:
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

    @property
    def bit_noise(self) -> float:
        """Standard deviation of the noise on quantile clipping's bits; 0 for the other clippings."""
        if self.config.clipping != "quantile":
            return 0.0
        return _bit_noise(self.config, expected_cohort=self.expected_cohort)

    @property
    def update_multiplier(self) -> float:
        """The noise multiplier of the updates: z, or more where quantile clipping pays for its bits out of z."""
        multiplier = self.config.noise_multiplier
        if self.config.clipping != "quantile" or multiplier == 0:
            return multiplier
        # In Python, for a plan is read while a round is traced; the same as `adaptive.update_multiplier`.
        return multiplier / math.sqrt(1 - (multiplier / (2 * self.bit_noise)) ** 2)

    @property
    def accounted(self) -> bool:
        """Whether an epsilon can be stated at all: not for a median of norms, which reveals them."""
        return self.config.clipping != "median"

    def epsilon(self, rounds: int) -> float | None:
        """Returns the epsilon of `rounds` rounds at the configured delta, or None when nothing bounds it."""
        if not self.accounted:
            return None
        if self.config.local_epsilon is not None:
            return laplace.laplace_epsilon(self.config.local_epsilon, rounds=rounds)
        figure = accounting.epsilon(self.mechanism, rounds=rounds, delta=self.config.delta)
        return figure if math.isfinite(figure) else None

    def epsilon_curve(self, rounds: int) -> tuple[float | None, ...]:
        """Returns the epsilon after each of the rounds 1 to `rounds`."""
        return tuple(self.epsilon(count) for count in range(1, rounds + 1))

    def max_rounds(self, budget: float) -> int:
        """Returns the most rounds whose epsilon stays at or below `budget`; 0 when not even one does."""
        if not self.accounted:
            return 0
        if self.config.local_epsilon is not None:
            return min(math.floor(budget / self.config.local_epsilon), calibration.MOST_ROUNDS)
        return calibration.max_rounds(self.mechanism, target_epsilon=budget, delta=self.config.delta)

    def statement(self, rounds: int) -> PrivacyStatement:
        """Returns the guarantee after `rounds` rounds, with relation, unit and accountant."""
        if self.config.local_epsilon is not None:
            account = laplace.laplace_account(self.mechanism, local_epsilon=self.config.local_epsilon, rounds=rounds)
        else:
            account = accounting.account(self.mechanism, rounds=rounds, delta=self.config.delta)
        if not self.accounted:
            account = replace(account, epsilon=None, beside_epsilon=None, remark=NOT_ACCOUNTED)
        return PrivacyStatement(**asdict(account), clip_norm=self.config.clip_norm)


def _bit_noise(config: PrivacyConfig, *, expected_cohort: float) -> float:
    if config.bit_noise is not None:
        return config.bit_noise
    return adaptive.default_bit_noise(expected_cohort=expected_cohort, noise_multiplier=config.noise_multiplier)


def _check_mechanism(config: PrivacyConfig) -> None:
    if config.mechanism == "gaussian":
        if config.local_epsilon is not None:
            raise PrivacyError(
                "local_epsilon",
                config.local_epsilon,
                'only mechanism "laplace" has one; set privacy.mechanism = "laplace", or leave it out',
            )
        if config.clip_kind != "l2":
            raise PrivacyError("clip_kind", config.clip_kind, 'Gaussian noise is accounted against L2 norms; use "l2"')
        return
    if config.local_epsilon is None:
        raise PrivacyError("local_epsilon", None, 'mechanism "laplace" needs the epsilon of one release; set it')
    if config.clip_kind == "l2":
        raise laplace.refuse_l2(clip_norm=config.clip_norm, local_epsilon=config.local_epsilon)
    if config.noise_multiplier != 0:
        raise PrivacyError(
            "noise_multiplier",
            config.noise_multiplier,
            'mechanism "laplace" takes its noise from local_epsilon and adds no Gaussian noise; leave it out',
        )
    if config.clipping != "fixed":
        raise PrivacyError(
            "clipping", config.clipping, 'mechanism "laplace" needs a bound known beforehand; use "fixed"'
        )


def _check_clipping(config: PrivacyConfig, *, expected_cohort: float) -> None:
    if config.clipping == "quantile":
        bit_noise = _bit_noise(config, expected_cohort=expected_cohort)
        adaptive.check_bit_noise(bit_noise, noise_multiplier=config.noise_multiplier)
        return
    unused = config.model_dump(include={"target_quantile", "clip_learning_rate", "bit_noise"})
    for field, value in unused.items():
        if value != PrivacyConfig.model_fields[field].default:
            remedy = f'clipping "{config.clipping}" has no use for it; set privacy.clipping = "quantile"'
            raise PrivacyError(field, value, f"{remedy}, or leave it out")
    if config.clipping == "median" and config.target_epsilon is not None:
        raise PrivacyError(
            "target_epsilon",
            config.target_epsilon,
            'clipping "median" is not accounted, so no budget can be kept; use "fixed" or "quantile"',
        )
