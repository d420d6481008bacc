"""The configuration of a sweep: a base study of one task, the axes it is varied along, and where it runs."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, ValidationError, model_validator

from capsfl.config import ConfigError, read_toml
from capsfl.federated.federation import RoundsConfig
from capsfl.privacy.plan import PrivacyConfig
from capsfl.settings import Settings, explain
from capsfl.sweeps.problems import Problem, SyntheticProblem

COMMAND = "capsfl sweep CONFIG"

Value = bool | int | float | str | tuple[int, ...]
"""What an axis can set a field to."""


class Assignment(Settings):
    """One field of the base study set to one value."""

    field: str
    """Dotted name, such as privacy.clip_norm."""
    value: Value
    """What it becomes."""


class GridAxis(Settings):
    """A field and the values it takes, each combined with all values of the other axes."""

    field: str
    """Dotted name, such as privacy.clip_norm."""
    values: tuple[Value, ...] = Field(min_length=1)
    """What it takes, in order."""


class RandomAxis(Settings):
    """A field drawn at random, together with all other random fields, `sweep.draws` times."""

    field: str
    """Dotted name, such as training.local.learning_rate."""
    distribution: Literal["uniform", "log_uniform", "choice"]
    """Even between `low` and `high`, even in the logarithm, or any of `values`."""
    low: float | None = None
    """Lower end of `uniform` and `log_uniform`."""
    high: float | None = None
    """Upper end of `uniform` and `log_uniform`."""
    values: tuple[Value, ...] = ()
    """What `choice` chooses from."""

    @model_validator(mode="after")
    def _complete(self) -> "RandomAxis":
        if self.distribution == "choice":
            if not self.values or self.low is not None or self.high is not None:
                raise ValueError(f"{self.field}: choice takes `values`, at least one, and no `low` and `high`")
            return self
        if self.values or self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"{self.field}: {self.distribution} takes `low` below `high`, and no `values`")
        if self.distribution == "log_uniform" and self.low <= 0:
            raise ValueError(f"{self.field}: log_uniform takes `low` above 0, not {self.low:g}; or use uniform")
        return self


def _refuse_repeated(name: str, values: Any) -> None:
    seen = []
    for value in values:
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in seen):
            raise ValueError(f"{name}: {value} is given twice; name every value once")
        seen.append(value)


class AxesConfig(Settings):
    """The studies of a sweep: (grid x draws, then single points) x target epsilons x seeds."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0,), min_length=1)
    """Seeds of weights, sampling and noise; every setting is run with each, and intervals are taken over them."""
    target_epsilon: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], tyro.conf.arg(prefix_name=False, help_behavior_hint="")
    ] = ()
    """Epsilons after the last round; each is an axis value whose noise multiplier is solved for."""
    grid: tuple[GridAxis, ...] = ()
    """`[sweep.grid]`: a list of values per dotted field, all combinations."""
    random: tuple[RandomAxis, ...] = ()
    """`[sweep.random]`: a distribution per dotted field."""
    draws: int = Field(default=8, ge=1)
    """How often the random fields are drawn; every combination of the grid sees the same draws."""
    draw_seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    points: tuple[tuple[Assignment, ...], ...] = ()
    """`[[sweep.points]]`: single settings beside the grid, each a table of dotted fields."""

    @model_validator(mode="after")
    def _distinct(self) -> "AxesConfig":
        for name, values in (("seeds", self.seeds), ("target_epsilon", self.target_epsilon)):
            _refuse_repeated(name, values)
        for axis in self.grid:
            _refuse_repeated(axis.field, axis.values)
        axes = [axis.field for axis in (*self.grid, *self.random)]
        _refuse_repeated("fields of grid and random", axes)
        return self


class ExecutionConfig(Settings):
    """Where and in which portions the studies run; nothing here changes a result beyond rounding."""

    part: Annotated[str, tyro.conf.arg(prefix_name=False)] = Field(default="", pattern=r"^(|auto|\d+/\d+)$")
    """This process's share, such as 0/8; `auto` reads it from SLURM or a Kubernetes indexed Job; empty for all."""
    devices: int | None = Field(default=None, ge=1)
    """Devices the studies are spread over; all local ones when absent, on a CPU one per core."""
    width: int | None = Field(default=None, ge=1)
    """Studies vmapped at once on a device; by measured time on a CPU and by memory elsewhere when absent."""
    hospitals: int | None = Field(default=None, ge=1)
    """Hospitals of a cohort vmapped at once within a study; default 1 on a CPU, else all."""
    memory_fraction: float = Field(default=0.6, gt=0, le=1)
    """Share of the free memory that a program may plan for."""
    save_every_s: float = Field(default=20.0, gt=0)
    """About how long a portion takes after which results are written; never less than one pass of the program."""


class SweepConfig(Settings):
    """A sweep: the problem, the base study, its axes and the execution."""

    out: str = "runs/sweep"
    """Folder of the results; a sweep resumes from it."""
    problem: Annotated[Problem, Field(discriminator="kind")] = SyntheticProblem()
    """What is trained, on whose records."""
    training: RoundsConfig = RoundsConfig()
    """Rounds, local training and server of the base study."""
    privacy: PrivacyConfig = PrivacyConfig(clip_norm=1.0)
    """Sampling, clipping and noise of the base study."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Rounds between two scores of a curve; a tenth of the rounds when absent. The last round is always scored."""
    sweep: AxesConfig = AxesConfig()
    """What is varied."""
    execution: ExecutionConfig = ExecutionConfig()
    """Where it runs."""

    def table(self) -> dict[str, Any]:
        """What decides the results: all but the folder and the execution; JSON-ready."""
        return self.model_dump(mode="json", exclude={"out", "execution"})

    def digest(self) -> str:
        """SHA-256 of `table`."""
        text = json.dumps(self.table(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_sweep(path: Path) -> SweepConfig:
    """Reads and validates a sweep's TOML file.

    Raises:
        ConfigError: unreadable file, malformed TOML, or fields that are unknown, of a wrong type or out of range.
    """
    table = read_toml(path)
    axes = table.get("sweep")
    if isinstance(axes, dict):
        table["sweep"] = axes | {
            name: form(axes[name], f"{path}: sweep.{name}")
            for name, form in (("grid", _grid), ("random", _random), ("points", _points))
            if name in axes
        }
    try:
        return SweepConfig.model_validate_json(json.dumps(table))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), command=COMMAND)) from error


def _grid(table: Any, place: str) -> list[dict[str, Any]]:
    rows = [{"field": field, "values": values} for field, values in _leaves(table, place)]
    for row in rows:
        if not isinstance(row["values"], list):
            raise ConfigError(f"{place}.{row['field']} = {json.dumps(row['values'])}: expected a list of values")
        if not row["values"]:
            raise ConfigError(f"{place}.{row['field']} = []: no values; list some or leave the field out")
    return rows


def _random(table: Any, place: str) -> list[dict[str, Any]]:
    rows = []
    for field, value in _leaves(table, place, until="distribution"):
        if not isinstance(value, Mapping):
            raise ConfigError(f'{place}.{field}: expected {{ distribution = "log_uniform", low = ..., high = ... }}')
        rows.append({"field": field, **value})
    return rows


def _points(tables: Any, place: str) -> list[list[dict[str, Any]]]:
    if not isinstance(tables, list):
        raise ConfigError(f"{place}: expected [[sweep.points]], one table of dotted fields per setting")
    return [[{"field": field, "value": value} for field, value in _leaves(table, place)] for table in tables]


def _leaves(table: Any, place: str, trail: str = "", until: str | None = None) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested tables, whether or not the dots were quoted in the TOML file."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place}: expected a table of dotted fields, such as privacy.clip_norm = [0.1, 1.0]")
    for name, value in table.items():
        field = f"{trail}.{name}" if trail else name
        if isinstance(value, Mapping) and (until is None or until not in value):
            yield from _leaves(value, place, field, until)
        else:
            yield field, value
