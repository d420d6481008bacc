"""From axes to studies: every point a whole configuration, checked, with its noise and its privacy statement."""

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from capsfl.federated.aggregation import make_rule
from capsfl.federated.federation import RoundsConfig
from capsfl.privacy.calibration import solve
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan, PrivacyStatement
from capsfl.settings import Settings, explain
from capsfl.sweeps.config import COMMAND, RandomAxis, SweepConfig, Value
from capsfl.sweeps.problems import Problem

TRACED = {
    "privacy.clip_norm": 1.0,
    "privacy.noise_multiplier": 0.0,
    "training.local.learning_rate": 1.0,
    "training.server.learning_rate": 1.0,
}
"""Fields that one compiled program takes as arguments, and what stands for them in a group's configuration."""

SECTIONS = ("problem", "training", "privacy")


class PointError(ValueError):
    """A study of a sweep that cannot be run; the message names the field, the value and the remedy."""


class Point(Settings):
    """The whole configuration of one study."""

    problem: Annotated[Problem, Field(discriminator="kind")]
    """What is trained."""
    training: RoundsConfig
    """How."""
    privacy: PrivacyConfig
    """Under which noise."""
    seed: int
    """Of weights, sampling and noise."""


@dataclass(frozen=True)
class Study:
    """One study of a sweep.

    Attributes:
        number: its place in the sweep, from 0; a result is kept under it.
        point: its configuration, as a run of its own would have it.
        setting: the swept fields and their values; without the seed, so equal in studies that differ by seed alone.
        target_epsilon: what its noise multiplier was solved for, else None.
    """

    number: int
    point: Point
    setting: tuple[tuple[str, Value], ...]
    target_epsilon: float | None = None


def expand(config: SweepConfig) -> list[Study]:
    """Lists the studies of a sweep, seeds varying fastest.

    Raises:
        PointError: an axis over an unknown field, a value that the field refuses, or the same setting twice.
    """
    axes = config.sweep
    base = config.model_dump(mode="json", include=set(SECTIONS))
    known = dict(_flatten(base))
    for field in [*(axis.field for axis in (*axes.grid, *axes.random)), *(a.field for p in axes.points for a in p)]:
        _check_field(field, known, targets=bool(axes.target_epsilon))
    studies: list[Study] = []
    seen: set[Any] = set()
    for setting in _settings(config):
        for target in axes.target_epsilon or (None,):
            named = setting if target is None else (*setting, ("target_epsilon", target))
            if named in seen:
                raise PointError(f"sweep: {describe(named)} is listed twice; name every setting once")
            seen.add(named)
            for seed in axes.seeds:
                studies.append(Study(len(studies), _assemble(base, setting, seed), named, target))
    return studies


def resolve(study: Study, *, num_hospitals: int) -> Study:
    """Solves the noise multiplier of a target epsilon and checks the study against its hospitals.

    Raises:
        PointError: no noise meets the target, or the privacy section contradicts itself, the rule or the hospitals.
    """
    point = study.point
    try:
        if study.target_epsilon is not None:
            point = point.model_copy(update={"privacy": _solved(point, study.target_epsilon, num_hospitals)})
        _check_sweepable(point)
        plan = plan_of(point, num_hospitals=num_hospitals)
        make_rule(point.training.aggregation, plan)
        if point.training.scaffold and (plan.noises_sum or plan.config.local_epsilon is not None):
            raise PrivacyError("training.scaffold", "true", "control variates leave the hospitals un-noised; add none")
    except PrivacyError as error:
        raise PointError(f"{error} (study {study.number}: {describe(study.setting) or 'the base study'})") from None
    return Study(study.number, point, study.setting, study.target_epsilon)


def _check_sweepable(point: Point) -> None:
    """Refuses what needs more than one state, one sum and one key per study."""
    unfit: tuple[tuple[str, Any, str], ...] = (
        ("unit", point.privacy.unit, "hospital"),
        ("noise", point.privacy.noise, "independent"),
        ("noise_key", point.privacy.noise_key, "seed"),
    )
    for field, value, fit in unfit:
        if value != fit:
            raise PrivacyError(f"privacy.{field}", value, f'a sweep takes "{fit}"; use `capsfl train` for "{value}"')
    masked = getattr(point.problem, "stage", None) == "classification"
    if masked and (point.privacy.noise_multiplier > 0 or point.privacy.local_epsilon is not None):
        remedy = (
            "the slices are masked by a segmentation that all hospitals trained, which no epsilon of this sweep "
            "covers; sweep without noise, or train both stages with `capsfl train`"
        )
        raise PrivacyError("problem.stage", "classification", remedy)
    if point.training.diagnostics:
        raise PrivacyError("training.diagnostics", "true", "a sweep keeps no moments of updates; leave it out")
    if point.training.aggregation.rule == "mae_votes":
        raise PrivacyError(
            "training.aggregation.rule", "mae_votes", "a sweep holds no votes; use `capsfl train` for it"
        )


def plan_of(point: Point, *, num_hospitals: int) -> PrivacyPlan:
    """The point's privacy plan; what is costly in it is found once for all clip norms."""
    private: Any = point.privacy.model_copy(update={"clip_norm": 1.0})
    plan = _plan(private, num_hospitals, point.training.rounds)
    return replace(plan, config=point.privacy)


def statement_of(point: Point, *, num_hospitals: int) -> PrivacyStatement:
    """What the point's rounds guarantee its hospitals together."""
    # Of the clip norm no epsilon depends, so that all share one account.
    private: Any = point.privacy.model_copy(update={"clip_norm": 1.0})
    return _statement(private, num_hospitals, point.training.rounds)


def group_key(point: Point, *, num_hospitals: int) -> tuple[Point, float, int]:
    """What a compiled program is made for: the point without its traced fields, noise on clipping bits, slots."""
    table: dict[str, Any] = point.model_dump(mode="json") | {"seed": 0}
    for field, value in TRACED.items():
        _assign(table, field, value)
    plan = plan_of(point, num_hospitals=num_hospitals)
    # Caps may differ in a group, whose slots fit the largest: a mask holds each study to its own. Only what is not a
    # plain sum is made for a number of slots.
    aggregation = point.training.aggregation
    plain = aggregation.rule == "mean" and not aggregation.secure
    table["privacy"]["truncation"] = None
    return Point.model_validate_json(json.dumps(table)), plan.bit_noise, 0 if plain else plan.num_slots


def describe(setting: Sequence[tuple[str, Value]]) -> str:
    """A setting in words: `learning rate 0.1, clip norm 0.5`."""
    return ", ".join(f"{_short(field)} {_word(value)}" for field, value in setting)


def _short(field: str) -> str:
    """The end of a dotted name: `training.server.learning_rate` is the server learning rate."""
    parts = [part for part in field.split(".")[1:] if part not in ("local", "kind")] or [field]
    return " ".join(parts[-2:]).replace("_", " ")


def _word(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')


def _settings(config: SweepConfig) -> Iterator[tuple[tuple[str, Value], ...]]:
    """The settings without seeds and targets: grid times draws, then the single points."""
    axes = config.sweep
    draws: list[tuple[tuple[str, Value], ...]] = [()]
    if axes.random:
        draws = [
            tuple((axis.field, _draw(axis, axes.draw_seed, number)) for axis in axes.random)
            for number in range(axes.draws)
        ]
    if axes.grid or axes.random or not axes.points:
        columns = [[(axis.field, value) for value in axis.values] for axis in axes.grid]
        for cell in itertools.product(*columns):
            for draw in draws:
                yield (*cell, *draw)
    for point in axes.points:
        fields = [assignment.field for assignment in point]
        if len(set(fields)) != len(fields) or not fields:
            raise PointError(f"sweep.points: {fields}: expected at least one field, each once")
        yield tuple((assignment.field, assignment.value) for assignment in point)


def _draw(axis: RandomAxis, seed: int, number: int) -> Value:
    # A stream per field and draw: adding a field or a draw leaves the others as they are.
    generator = np.random.default_rng([seed, number, *axis.field.encode()])
    if axis.distribution == "choice":
        return axis.values[int(generator.integers(len(axis.values)))]
    assert axis.low is not None  # RandomAxis refuses to be without
    assert axis.high is not None
    if axis.distribution == "uniform":
        value = generator.uniform(axis.low, axis.high)
    else:
        value = math.exp(generator.uniform(math.log(axis.low), math.log(axis.high)))
    # Six digits are what a reader can copy into a configuration of its own.
    return min(max(float(f"{value:.6g}"), axis.low), axis.high)


def _check_field(field: str, known: Mapping[str, Any], *, targets: bool) -> None:
    if field == "privacy.target_epsilon":
        raise PointError(f"sweep: {field}: is solved for; list the targets in sweep.target_epsilon")
    if field.split(".")[-1] == "seed":
        raise PointError(f"sweep: {field}: seeds are no axis; list them in sweep.seeds")
    if field == "problem.kind":
        raise PointError(f"sweep: {field}: one sweep has one problem; write a configuration for each")
    if targets and field == "privacy.noise_multiplier":
        raise PointError(f"sweep: {field}: sweep.target_epsilon solves for it; leave one of the two out")
    if field not in known:
        close = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        guess = f"perhaps you meant {close[0]}" if close else f"see `{COMMAND} --help` for the known ones"
        raise PointError(f"sweep: {field}: unknown field of the base study; {guess}")


def _assemble(base: Mapping[str, Any], setting: Sequence[tuple[str, Value]], seed: int) -> Point:
    table = json.loads(json.dumps(base)) | {"seed": seed}
    for field, value in setting:
        _assign(table, field, value)
    try:
        return Point.model_validate_json(json.dumps(table))
    except ValidationError as error:
        raise PointError(explain(_without_kind(error), "sweep", command=COMMAND)) from None


def _without_kind(error: ValidationError) -> ValidationError:
    """The same findings without the name of the problem's kind in their place."""
    kinds = {"synthetic", "mnist", "phantom", "study"}
    rows: Any = [
        {
            "type": "value_error" if row["type"] == "value_error" else row["type"],
            "loc": tuple(part for place, part in enumerate(row["loc"]) if place != 1 or part not in kinds),
            "input": row["input"],
            "ctx": row.get("ctx", {}),
        }
        for row in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, rows)


def _assign(table: dict[str, Any], field: str, value: Value | float) -> None:
    *sections, name = field.split(".")
    for section in sections:
        table = table[section]
    table[name] = value


def _flatten(table: Mapping[str, Any], trail: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        field = f"{trail}.{name}" if trail else name
        if isinstance(value, Mapping):
            yield from _flatten(value, field)
        else:
            yield field, value


@cache
def _plan(private: PrivacyConfig, num_hospitals: int, rounds: int) -> PrivacyPlan:
    return PrivacyPlan.build(private, num_hospitals=num_hospitals, rounds=rounds)


@cache
def _statement(private: Any, num_hospitals: int, rounds: int) -> PrivacyStatement:
    return _plan(private, num_hospitals, rounds).statement(rounds)


def _solved(point: Point, target: float, num_hospitals: int) -> PrivacyConfig:
    private = point.privacy
    if private.mechanism != "gaussian" or private.clipping == "median":
        raise PrivacyError(
            "sweep.target_epsilon", target, "is met by Gaussian noise under fixed or quantile clipping; choose those"
        )
    found = _least_noise(
        target,
        num_hospitals,
        point.training.rounds,
        private.delta,
        private.sampler,
        private.cohort,
        private.truncation,
    )
    # The cap is the one the noise was solved with, so that a run of its own has the same epsilon.
    return private.model_copy(
        update={"noise_multiplier": found["noise_multiplier"], "truncation": found.get("truncation")}
    )


@cache
def _least_noise(
    target: float, hospitals: int, rounds: int, delta: float, sampler: Any, cohort: int | None, truncation: int | None
) -> dict[str, Any]:
    return solve(
        target,
        for_="noise_multiplier",
        hospitals=hospitals,
        rounds=rounds,
        delta=delta,
        sampler=sampler,
        cohort=cohort,
        truncation=truncation,
    )
