"""MNIST over 100, 1,000 and 10,000 hospitals at epsilon 8: the table of Geyer, Klein & Nabi 2017, with honest figures.

Hospitals hold two shards each of the images sorted by digit (McMahan et al. 2017), so most know two digits. Geyer
et al. sample a fixed number of hospitals and account for it as if each took part independently. Here every population
is trained twice: with Poisson sampling, whose epsilon of 8 under adding or removing a hospital is what they report, and
with their fixed sampling, whose epsilon of 8 under replacing one costs about twice the noise. MNIST has six images for
each of 10,000 hospitals: they hold those six, and none is given out twice.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from capsfl.bench.machine import describe
from capsfl.federated.federation import RoundsConfig
from capsfl.federated.local import LocalConfig
from capsfl.federated.server import ServerConfig
from capsfl.privacy.accounting import epsilon_report
from capsfl.privacy.plan import PrivacyConfig
from capsfl.sweeps.classifier import ImageModelConfig
from capsfl.sweeps.config import AxesConfig, ExecutionConfig, SweepConfig
from capsfl.sweeps.problems import MnistProblem
from capsfl.sweeps.results import read_rows
from capsfl.sweeps.run import run_sweep

EPSILON = 8.0
SAMPLERS: tuple[Literal["poisson", "fixed"], ...] = ("poisson", "fixed")


@dataclass(frozen=True)
class GeyerBench:
    """MNIST over 100, 1,000 and 10,000 hospitals at epsilon 8, after Geyer, Klein & Nabi 2017."""

    data: Path
    """Folder with the four IDX files of MNIST, gzipped or not."""
    populations: tuple[int, ...] = (100, 1000)
    """Numbers of hospitals, of 100, 1000 and 10000; the last one takes an accelerator."""
    seeds: int = 5
    """Seeds of weights, sampling and noise; intervals are taken over them."""
    quick: bool = False
    """Two rounds and two seeds: seconds instead of minutes."""


@dataclass(frozen=True)
class Setting:
    """How one population is trained; found on held-out training images, with seeds that are not those reported."""

    cohort: int
    delta: float
    rounds: int
    goal: float
    clip_norm: float
    learning_rate: float
    batch_size: int
    epochs: int
    model: ImageModelConfig
    pool: Literal[1, 2, 4]
    server: ServerConfig


SETTINGS = {
    100: Setting(30, 1e-3, 30, 0.78, 2.0, 1.0, 20, 1, ImageModelConfig(kind="mlp", hidden=()), 2, ServerConfig()),
    1000: Setting(100, 1e-5, 250, 0.92, 1.0, 0.5, 10, 2, ImageModelConfig(kind="mlp", hidden=(32,)), 2, ServerConfig()),
    10000: Setting(
        300,
        1e-6,
        400,
        0.96,
        1.0,
        0.3,
        6,
        4,
        ImageModelConfig(kind="cnn", channels=(8, 16), hidden=()),
        2,
        ServerConfig(),
    ),
}
FIRST_SEED = 100
"""Settings were chosen with seeds below it."""


def measure(options: GeyerBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains every population under both samplers with every seed.

    Returns:
        The result, JSON-ready: machine, settings, and a row for each population and sampler.

    Raises:
        ValueError: a population without a setting, no seed, or MNIST is not there; the message names the field.
    """
    for population in options.populations:
        if population not in SETTINGS:
            raise ValueError(f"populations = {population}: one of {', '.join(map(str, SETTINGS))}")
    if options.seeds < 1:
        raise ValueError(f"seeds = {options.seeds}: must be at least 1")
    rows = []
    for population in options.populations:
        for sampler in SAMPLERS:
            rows.append(_measure_row(options, population, sampler))
            say(f"geyer, {population} hospitals, {sampler}: {rows[-1]['accuracy']['median']:.3f}")
    return {
        "benchmark": "geyer",
        "quick": options.quick,
        "machine": describe(),
        "target_epsilon": EPSILON,
        "rows": rows,
    }


def sweep_config(
    options: GeyerBench, population: int, sampler: Literal["poisson", "fixed"], *, out: Path
) -> SweepConfig:
    """The sweep over seeds of one population and sampler; its noise is solved for."""
    setting = SETTINGS[population]
    seeds = 2 if options.quick else options.seeds
    local = LocalConfig(
        optimizer="sgd",
        learning_rate=setting.learning_rate,
        batch_size=setting.batch_size,
        epochs=setting.epochs,
    )
    return SweepConfig(
        out=str(out),
        problem=MnistProblem(
            folder=str(options.data), hospitals=population, pool=setting.pool, scored_on="test", model=setting.model
        ),
        training=RoundsConfig(rounds=2 if options.quick else setting.rounds, local=local, server=setting.server),
        privacy=PrivacyConfig(
            sampler=sampler, cohort=setting.cohort, clip_norm=setting.clip_norm, noise_multiplier=1, delta=setting.delta
        ),
        sweep=AxesConfig(seeds=tuple(range(FIRST_SEED, FIRST_SEED + seeds)), target_epsilon=(EPSILON,)),
        execution=ExecutionConfig(),
    )


def _measure_row(options: GeyerBench, population: int, sampler: Literal["poisson", "fixed"]) -> dict[str, Any]:
    setting = SETTINGS[population]
    with tempfile.TemporaryDirectory() as folder:
        config = sweep_config(options, population, sampler, out=Path(folder) / "sweep")
        found = list(read_rows(run_sweep(config, console=Console(quiet=True))).values())
    one = found[0]
    account = functools.partial(
        epsilon_report,
        hospitals=population,
        cohort=setting.cohort,
        noise_multiplier=one["noise_multiplier"],
        rounds=config.training.rounds,
        delta=setting.delta,
    )
    accuracies = sorted(float(row["utility"]) for row in found)
    return {
        "hospitals": population,
        "cohort": setting.cohort,
        "delta": setting.delta,
        "rounds": config.training.rounds,
        "sampler": sampler,
        "relation": one["relation"],
        "epsilon": one["epsilon"],
        "noise_multiplier": one["noise_multiplier"],
        # What the same noise costs under the fixed sampling of Geyer et al., replacing one hospital.
        "epsilon_fixed_replace_one": account(sampler="fixed")["epsilon"],
        "clip_norm": setting.clip_norm,
        "seeds": [row["seed"] for row in found],
        "accuracies": accuracies,
        "accuracy": {"min": accuracies[0], "median": statistics.median(accuracies), "max": accuracies[-1]},
        "goal": setting.goal if sampler == "poisson" else None,
        "cpu_s": sum(row["cpu_seconds"] for row in found),
        "setting": config.training.model_dump(mode="json"),
        "model": setting.model.model_dump(mode="json"),
        "pixels": 28 // setting.pool,
    }
