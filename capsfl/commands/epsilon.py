"""`capsfl epsilon`: the privacy loss of a setting, or the setting for a loss."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from capsfl.arguments import parse


@dataclass(frozen=True)
class EpsilonCommand:
    """Privacy loss of a setting, or with --target-epsilon the setting that meets one; under both relations."""

    hospitals: int | None = None
    """H, hospitals in the federation; for unit hospital."""
    patients: int | None = None
    """N, patients of one hospital; for unit patient."""
    cohort: int | None = None
    """m, expected hospitals in a round (all when absent), or expected patients in a local step."""
    noise_multiplier: float | None = None
    """z, standard deviation of the noise on the SUM over the clip norm; absent to solve for it."""
    rounds: int | None = None
    """T, rounds; absent to solve for it."""
    epochs: int | None = None
    """Local epochs in a round, of ceil(N / m) steps each; for unit patient; 1 when absent."""
    delta: float = 1e-5
    """Probability with which the bound may fail."""
    sampler: Literal["poisson", "fixed", "all", "cyclic"] = "poisson"
    """How a cohort is drawn; patients are drawn by poisson."""
    truncation: int | None = None
    """The most that a Poisson draw takes; the smallest cap costing < 0.1 % of epsilon when absent."""
    unit: Literal["hospital", "patient"] = "hospital"
    """Whom the guarantee protects: a hospital in the federation, or a patient of one hospital."""
    target_epsilon: float | None = None
    """Solve for the one of --noise-multiplier, --rounds that is absent (both given: for the cohort)."""
    json: bool = False
    """Print flat JSON."""


def run(words: list[str]) -> int:
    """Accounts for a setting."""
    given = parse(EpsilonCommand, words, prog="capsfl epsilon")
    row = _account_for_patients(given) if given.unit == "patient" else _account_for_hospitals(given)
    if given.json:
        print(json.dumps(row))
        return 0
    beside = Table("neighbours", "epsilon", box=None, pad_edge=False)
    headline, other = row["relation"], row["other_relation"]
    for relation in (headline, other):
        figure = row[f"epsilon_{relation}"]
        beside.add_row(relation.replace("_", " "), "unbounded" if figure is None else f"{figure:.6g}")
    Console().print(beside)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in row.items():
        table.add_row(name, "unbounded" if value is None and "epsilon" in name else str(value))
    Console().print(table)
    return 0


def _account_for_hospitals(given: EpsilonCommand) -> dict[str, Any]:
    from capsfl.privacy import epsilon_report, epsilon_under_both_relations, solve

    if given.hospitals is None:
        raise ValueError("hospitals: missing; give --hospitals, or --unit patient and --patients")
    _refuse_options(given, ("patients", "epochs"), unit="patient")
    unknown = _unknown(given, cohort="cohort")
    values: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("hospitals", "cohort", "noise_multiplier", "rounds", "delta", "sampler", "truncation")
    }
    if unknown != "cohort":
        values["cohort"] = given.hospitals if given.cohort is None else given.cohort
    if unknown is None or given.target_epsilon is None:
        row = epsilon_report(**values)
    else:
        del values[unknown]
        row = solve(given.target_epsilon, for_=unknown, **values)
    return row | epsilon_under_both_relations(row)


def _account_for_patients(given: EpsilonCommand) -> dict[str, Any]:
    from capsfl.privacy.patient_report import patient_report, solve_patients

    if given.patients is None:
        raise ValueError("patients: missing; give --patients, how many the hospital has")
    _refuse_options(given, ("hospitals",), unit="hospital")
    if given.sampler != "poisson":
        raise ValueError(f'sampler = {given.sampler}: patients are drawn by "poisson"; leave it out')
    unknown: Any = _unknown(given, cohort="expected_patients")
    if unknown != "expected_patients" and given.cohort is None:
        raise ValueError("cohort: missing; give --cohort, the patients expected in a local step")
    values: dict[str, Any] = {
        name: getattr(given, name) for name in ("patients", "noise_multiplier", "rounds", "delta")
    }
    epochs = 1 if given.epochs is None else given.epochs
    values |= {"expected_patients": given.cohort, "epochs": epochs, "truncation": given.truncation}
    if unknown is None or given.target_epsilon is None:
        return patient_report(**values)
    del values[unknown]
    return solve_patients(given.target_epsilon, for_=unknown, **values)


def _unknown(given: EpsilonCommand, *, cohort: str) -> Any:
    """What is to be solved for, None for epsilon; `cohort` is that field's name in the answer."""
    missing = [name for name in ("noise_multiplier", "rounds") if getattr(given, name) is None]
    if given.target_epsilon is None:
        for name in missing:
            flag = name.replace("_", "-")
            raise ValueError(f"{name}: missing; give --{flag}, or --target-epsilon to solve for it")
        return None
    if len(missing) == 2:
        raise ValueError("noise_multiplier, rounds: both missing; give one, and the other is solved for")
    if missing:
        return missing[0]
    if given.cohort is not None:
        raise ValueError(
            f"cohort = {given.cohort}: given, as are noise-multiplier and rounds; leave one out to solve for it"
        )
    return cohort


def _refuse_options(given: EpsilonCommand, fields: tuple[str, ...], *, unit: str) -> None:
    for field in fields:
        if getattr(given, field) is not None:
            raise ValueError(f"{field} = {getattr(given, field)}: of unit {unit}; leave it out, or give --unit {unit}")
