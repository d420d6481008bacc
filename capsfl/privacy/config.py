"""The privacy section of a configuration, and which of its choices contradict each other."""

from typing import Any, Literal

from pydantic import Field

from capsfl.privacy import accounting, adaptive, laplace
from capsfl.privacy.events import PrivacyError, Sampler
from capsfl.settings import Settings

LEAST_CLIP_NORM = 1e-12
"""Far below it the squares of a norm vanish in float32, and an update longer than S would pass unclipped."""


class PrivacyConfig(Settings):
    """Differential privacy of the released model: of whole hospitals, or of the patients in them."""

    unit: Literal["hospital", "patient"] = "hospital"
    """Whom the guarantee protects: a `hospital`'s whole update is clipped and noise added to the cohort's sum, or
    every `patient`'s gradient is clipped and noise added in each local step of its hospital (DP-SGD)."""
    sampler: Sampler = "all"
    """How a round's cohort is drawn: `poisson`, `fixed` (without replacement), `all`, or `cyclic` (groups in turn)."""
    cohort: int | None = Field(default=None, ge=1)
    """m, the expected number of hospitals in a round; all hospitals when absent."""
    truncation: int | None = Field(default=None, ge=1)
    """The most hospitals a Poisson round takes; when absent, the smallest cap costing < 0.1 % of epsilon."""
    clip_norm: float = Field(ge=LEAST_CLIP_NORM)
    """S, the L2 norm a hospital's whole update, or a patient's gradient, is clipped to."""
    noise_multiplier: float = Field(default=0.0, ge=0)
    """z, the standard deviation of the noise on the SUM divided by S; 0 trains without privacy."""
    delta: float = Field(default=1e-5, ge=accounting.SMALLEST_DELTA, lt=1)
    """The probability with which the epsilon bound may fail; well below 1 / hospitals, or 1 / patients."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """The privacy budget: training stops before a round that would exceed it."""
    noise_on: Literal["sum"] = "sum"
    """Noise is added to the sum, before the division by m; a sigma quoted on the mean is z = sigma m."""
    noise: Literal["independent", "banded"] = "independent"
    """`banded` noise partly cancels between rounds (matrix factorization): the same epsilon and less error in the
    model. It needs sampler `cyclic` and the extra capsfl[matrix]."""
    bands: int | None = Field(default=None, ge=2)
    """Rounds whose banded noise is correlated, at most the groups of the cyclic sampler; as many when absent."""
    noise_key: Literal["seed", "secret"] = "seed"
    """What sampling and noise are drawn from: the run's `seed`, which makes a study repeatable and its noise known to
    whoever reads the configuration, or a `secret` drawn once per run and kept beside its keys."""
    expected_patients: int | None = Field(default=None, ge=1)
    """m of a local step under unit `patient`: the expected number of patients, in the place of local.batch_size."""
    patient_truncation: int | None = Field(default=None, ge=1)
    """The most patients a local step takes; when absent, the smallest cap costing < 0.1 % of epsilon."""
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


def check_privacy(config: PrivacyConfig, *, expected_cohort: float, groups: int) -> None:
    """Refuses choices that contradict each other.

    Args:
        config: the section.
        expected_cohort: m.
        groups: of the cyclic sampler; 1 for the others.

    Raises:
        PrivacyError: the first contradiction; its field is not yet dotted.
    """
    _check_unit(config)
    _check_mechanism(config)
    _check_clipping(config, expected_cohort=expected_cohort)
    _check_noise(config, groups=groups)
    if config.mechanism == "gaussian" and config.target_epsilon is not None and config.noise_multiplier == 0:
        raise PrivacyError(
            "target_epsilon",
            config.target_epsilon,
            "no noise meets any budget; set privacy.noise_multiplier above 0, or leave the target out",
        )


def bit_noise_of(config: PrivacyConfig, *, expected_cohort: float) -> float:
    """Returns the standard deviation of the noise on quantile clipping's bits."""
    if config.bit_noise is not None:
        return config.bit_noise
    return adaptive.default_bit_noise(expected_cohort=expected_cohort, noise_multiplier=config.noise_multiplier)


def _check_unit(config: PrivacyConfig) -> None:
    if config.unit == "hospital":
        _refuse_unused(config, ("expected_patients", "patient_truncation"), 'unit "hospital"', 'unit = "patient"')
        return
    if config.expected_patients is None:
        raise PrivacyError("expected_patients", None, 'unit "patient" needs the patients expected in a local step')
    if config.mechanism != "gaussian":
        remedy = 'unit "patient" adds Gaussian noise in local steps; use "gaussian", or unit "hospital"'
        raise PrivacyError("mechanism", config.mechanism, remedy)
    if config.clipping != "fixed":
        remedy = 'unit "patient" clips gradients to a fixed norm; use "fixed", or unit "hospital"'
        raise PrivacyError("clipping", config.clipping, remedy)
    if config.noise != "independent":
        remedy = 'unit "patient" draws patients at random, and banded noise needs them apart; use "independent"'
        raise PrivacyError("noise", config.noise, remedy)


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
        bit_noise = bit_noise_of(config, expected_cohort=expected_cohort)
        adaptive.check_bit_noise(bit_noise, noise_multiplier=config.noise_multiplier)
        return
    unused = ("target_quantile", "clip_learning_rate", "bit_noise")
    _refuse_unused(config, unused, f'clipping "{config.clipping}"', 'clipping = "quantile"')
    if config.clipping == "median" and config.target_epsilon is not None:
        raise PrivacyError(
            "target_epsilon",
            config.target_epsilon,
            'clipping "median" is not accounted, so no budget can be kept; use "fixed" or "quantile"',
        )


def _check_noise(config: PrivacyConfig, *, groups: int) -> None:
    if config.noise == "independent":
        _refuse_unused(config, ("bands",), 'noise "independent"', 'noise = "banded"')
        return
    if config.sampler != "cyclic" or groups < 2:
        remedy = (
            "it is accounted for hospitals whose rounds lie apart, which only groups in turn keep; set "
            'privacy.sampler = "cyclic" and a privacy.cohort below the number of hospitals, or use "independent"'
        )
        raise PrivacyError("noise", config.noise, remedy)
    if config.bands is not None and config.bands > groups:
        remedy = f"a hospital comes back after {groups} rounds, so noise may be correlated over at most as many"
        raise PrivacyError("bands", config.bands, remedy)
    if config.mechanism != "gaussian":
        raise PrivacyError("noise", config.noise, f'mechanism "{config.mechanism}" has none; use "independent"')
    if config.clipping != "fixed":
        remedy = f'banded noise has one size in all rounds, and clipping "{config.clipping}" changes S; use "fixed"'
        raise PrivacyError("clipping", config.clipping, remedy)
    if config.noise_key == "secret":
        remedy = (
            "banded noise carries its past into every checkpoint, which would give it away; use "
            '"seed", or noise "independent"'
        )
        raise PrivacyError("noise_key", config.noise_key, remedy)


def _refuse_unused(config: PrivacyConfig, fields: tuple[str, ...], choice: str, remedy: str) -> None:
    """Refuses fields that differ from their defaults although a choice leaves them without meaning."""
    values: dict[str, Any] = config.model_dump(include=set(fields))
    for field in fields:
        if values[field] != PrivacyConfig.model_fields[field].default:
            message = f"{choice} has no use for it; set privacy.{remedy}, or leave it out"
            raise PrivacyError(field, values[field], message)
