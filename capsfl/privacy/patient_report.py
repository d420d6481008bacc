"""What patient-level training costs one hospital's patients before anything is trained, or what a target buys."""

from typing import Any, Literal

from capsfl.privacy import accounting
from capsfl.privacy.calibration import MOST_ROUNDS, largest, solve
from capsfl.privacy.config import PrivacyConfig
from capsfl.privacy.events import PrivacyError, SampledGaussian
from capsfl.privacy.patient_plan import Stage, patient_plan
from capsfl.privacy.patients import steps_in_epoch

_TASK = "training"
_HOSPITAL = "this hospital"


def patient_report(
    *,
    patients: int,
    expected_patients: int,
    noise_multiplier: float,
    rounds: int,
    epochs: int = 1,
    delta: float,
    truncation: int | None = None,
) -> dict[str, Any]:
    """Returns what `rounds` rounds cost the patients of a hospital, as flat JSON with unit, relation and accountant.

    Args:
        patients: N, of the hospital.
        expected_patients: m, drawn in a local step on average; a round has `epochs * ceil(N / m)` steps.
        noise_multiplier: z, of the noise on the sum of a step's clipped gradients.
        rounds: T, in all of which the hospital takes part.
        epochs: local epochs in a round.
        delta: the chance with which the bound may fail.
        truncation: the most patients a step takes; the smallest cap costing < 0.1 % of epsilon when absent.

    Raises:
        PrivacyError: A value is out of range or contradicts another.
    """
    accounting.check_budget(rounds=rounds, delta=delta)
    if not 1 <= expected_patients <= patients:
        remedy = f"must lie between 1 and the hospital's patients ({patients})"
        raise PrivacyError("expected_patients", expected_patients, remedy)
    # Names any other value that is out of range.
    SampledGaussian("poisson", patients, expected_patients, noise_multiplier, truncation)
    config = PrivacyConfig(
        unit="patient",
        clip_norm=1.0,
        noise_multiplier=noise_multiplier,
        expected_patients=expected_patients,
        patient_truncation=truncation,
        delta=delta,
    )
    plan = patient_plan(config, (Stage(_TASK, rounds, epochs, ((_HOSPITAL, patients),)),))
    row = plan.account(rounds).to_json()
    steps = plan.losses(rounds)[0].steps
    row |= {"patients": patients, "expected_patients": expected_patients, "epochs": epochs, "local_steps": steps}
    mechanism = SampledGaussian("poisson", patients, expected_patients, noise_multiplier, row["truncation"])
    other = accounting.epsilon_under(mechanism, "replace_one", rounds=steps, delta=delta)
    row |= {"epsilon_add_or_remove_one": row["epsilon"], "epsilon_replace_one": accounting.finite(other)}
    del row["hospitals"], row["cohort"]
    return row | {"other_relation": "replace_one"}


def solve_patients(
    target_epsilon: float,
    *,
    for_: Literal["noise_multiplier", "rounds", "expected_patients"],
    patients: int,
    epochs: int = 1,
    delta: float,
    expected_patients: int | None = None,
    noise_multiplier: float | None = None,
    rounds: int | None = None,
    truncation: int | None = None,
) -> dict[str, Any]:
    """Returns the report of the least noise, the most rounds or the most patients in a step within a target.

    More patients in a step mean fewer steps, and the epsilon rises with them but for the rounding of ceil(N / m): the
    number found is within the target and the next one is not, and one far above may be within it again.

    Returns:
        `patient_report` of the solution, with `target_epsilon` and `solved_for` added.

    Raises:
        PrivacyError: The unknown is given as well, another value is missing, or no solution exists.
    """
    given = {"noise_multiplier": noise_multiplier, "rounds": rounds, "expected_patients": expected_patients}
    for field, value in given.items():
        if field == for_ and value is not None:
            raise PrivacyError(field, value, "is what is solved for; leave it out")
        if field != for_ and not value:
            raise PrivacyError(field, value, f"must be above 0 to solve for {for_}")
    affordable = target_epsilon if truncation is not None else target_epsilon / (1 + accounting.TRUNCATION_COST)
    fixed: dict[str, Any] = {"patients": patients, "epochs": epochs, "delta": delta, "truncation": truncation}
    if for_ == "noise_multiplier":
        assert rounds is not None
        assert expected_patients is not None
        found = solve(
            target_epsilon,
            for_="noise_multiplier",
            hospitals=patients,
            cohort=expected_patients,
            rounds=rounds * epochs * steps_in_epoch(patients, expected_patients),
            delta=delta,
            sampler="poisson",
            truncation=truncation,
        )
        # The cap that was found is not handed on: the report looks for it again, and finds the same.
        given["noise_multiplier"] = found["noise_multiplier"]
    elif for_ == "rounds":
        count = largest(lambda t: _costs(given | {"rounds": t}, fixed) <= affordable, most=MOST_ROUNDS)
        if count == 0:
            raise PrivacyError("target_epsilon", target_epsilon, "is exceeded by one round; add noise")
        given["rounds"] = count
    else:
        count = largest(lambda m: _costs(given | {"expected_patients": m}, fixed) <= affordable, most=patients)
        if count == 0:
            raise PrivacyError("target_epsilon", target_epsilon, "is exceeded by one patient in a step; add noise")
        given["expected_patients"] = count
    return patient_report(**given, **fixed) | {"target_epsilon": target_epsilon, "solved_for": for_}


def _costs(given: dict[str, Any], fixed: dict[str, Any]) -> float:
    """The epsilon of a setting without its automatic cap."""
    count, expected = fixed["patients"], given["expected_patients"]
    mechanism = SampledGaussian("poisson", count, expected, given["noise_multiplier"], fixed["truncation"])
    steps = given["rounds"] * fixed["epochs"] * steps_in_epoch(count, expected)
    return accounting.epsilon(mechanism, rounds=steps, delta=fixed["delta"])
