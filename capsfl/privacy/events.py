"""The mechanism that is accounted: one round of sampling, clipping and Gaussian noise over hospitals."""

import math
from dataclasses import dataclass
from typing import Literal

import dp_accounting

Sampler = Literal["poisson", "fixed", "all", "cyclic"]
Relation = Literal["add_or_remove_one", "replace_one"]


class PrivacyError(ValueError):
    """A privacy setting that cannot be honoured: field, value and remedy in one line."""

    def __init__(self, field: str, value: object, remedy: str):
        super().__init__(f"{field} = {value}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy

    def __reduce__(self) -> tuple[type["PrivacyError"], tuple[str, object, str]]:
        return PrivacyError, (self.field, self.value, self.remedy)

    def under(self, section: str) -> "PrivacyError":
        """Returns the same refusal with the field's name dotted under `section`."""
        return PrivacyError(f"{section}.{self.field}", self.value, self.remedy)


@dataclass(frozen=True)
class SampledGaussian:
    """One round: a cohort drawn from the hospitals, a sum clipped to S each, noise N(0, z^2 S^2 I) on it.

    Attributes:
        sampler: `poisson` (each hospital independently with probability m/H, the surplus over `truncation`
            dropped uniformly), `fixed` (m of H without replacement), `all`, or `cyclic` (the hospitals fall into
            ceil(H/m) groups beforehand, hospital i into group i mod ceil(H/m), and rounds visit them in turn).
        hospitals: H, how many hospitals take part in the study: the larger one of two neighbouring studies.
        cohort: m, the expected cohort of a round.
        noise_multiplier: z, the standard deviation of the noise on the SUM divided by S.
        truncation: the most hospitals a Poisson round takes; None stands for H.

    Raises:
        PrivacyError: The fields contradict each other.
    """

    sampler: Sampler
    hospitals: int
    cohort: int
    noise_multiplier: float
    truncation: int | None = None

    def __post_init__(self) -> None:
        if self.hospitals < 1:
            raise PrivacyError("hospitals", self.hospitals, "must be at least 1")
        if not 1 <= self.cohort <= self.hospitals:
            raise PrivacyError(
                "cohort", self.cohort, f"must lie between 1 and the number of hospitals ({self.hospitals})"
            )
        group = -(-self.hospitals // self.groups)
        if self.sampler == "cyclic" and self.cohort != group:
            remedy = f"{self.hospitals} hospitals fall into {self.groups} groups of at most {group}; use {group}"
            raise PrivacyError("cohort", self.cohort, remedy)
        if self.sampler == "all" and self.cohort != self.hospitals:
            raise PrivacyError(
                "cohort",
                self.cohort,
                f'sampler "all" takes all {self.hospitals} hospitals; leave cohort out, '
                'or choose sampler "poisson" or "fixed"',
            )
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError("noise_multiplier", self.noise_multiplier, "must be finite and not negative")
        if self.truncation is None:
            return
        if self.sampler != "poisson":
            remedy = f'only sampler "poisson" is truncated; leave it out for "{self.sampler}"'
            raise PrivacyError("truncation", self.truncation, remedy)
        if not self.cohort <= self.truncation <= self.hospitals:
            raise PrivacyError(
                "truncation",
                self.truncation,
                f"must lie between the expected cohort ({self.cohort}) and the number of hospitals ({self.hospitals})",
            )

    @property
    def relation(self) -> Relation:
        """The neighbouring relation of the headline epsilon."""
        return "replace_one" if self.sampler == "fixed" else "add_or_remove_one"

    @property
    def num_slots(self) -> int:
        """The most hospitals one round can take, which is the static shape of its cohort."""
        if self.sampler == "poisson":
            return self.hospitals if self.truncation is None else self.truncation
        return self.cohort

    @property
    def groups(self) -> int:
        """ceil(H / m): under `cyclic`, the groups that rounds visit in turn, and the rounds between two visits."""
        return -(-self.hospitals // self.cohort)

    def releases(self, rounds: int) -> int:
        """Returns the most of `rounds` rounds on end that one hospital can take part in."""
        return -(-rounds // self.groups) if self.sampler == "cyclic" else rounds

    @property
    def sampling_probability(self) -> float:
        """m / H, the chance that a given hospital is drawn; under `cyclic` about its share of the rounds."""
        return self.cohort / self.hospitals

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The dp-accounting event of one round behind the headline epsilon.

        Sampling without replacement is the truncated event with every hospital drawn and m kept at random. Under
        `cyclic` it is the event of one of the `releases`, and costs only those who are in that round's group.
        """
        if self.sampler in ("all", "cyclic"):
            return dp_accounting.GaussianDpEvent(self.noise_multiplier)
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.hospitals,
            sampling_probability=self.sampling_probability if self.sampler == "poisson" else 1.0,
            truncated_batch_size=self.num_slots,
            noise_multiplier=self.noise_multiplier,
        )
