"""What capsule networks claim on MNIST: test error over seeds, and error on affine-distorted digits they never saw.

Sabour et al. 2017, section 5 (three routing iterations, reconstruction, shifts of two pixels; 0.25 %) and 5.2 (digits
on a canvas of 40 pixels, then affNIST); Mazzia et al. 2021 (Efficient-CapsNet, 161k parameters; 0.26 %). The distorted
digits are made here from the test images, with the ranges of affNIST; a convolutional network of equal size stands
beside the capsules.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from pydantic import Field, ValidationError

from capsfl.bench.digit_training import DigitTrainer, DigitTrainingConfig
from capsfl.bench.digits import CANVAS, place, place_distorted
from capsfl.bench.machine import describe
from capsfl.bench.plain_digits import PlainDigits, count_weights, plain_of_size
from capsfl.config import ConfigError, read_toml
from capsfl.learning.networks import NetworkConfig, make_network
from capsfl.settings import Settings, explain
from capsfl.sweeps.mnist import read_mnist


class MnistConfig(Settings):
    """A network and how it learns MNIST."""

    model: NetworkConfig
    """The network; ten classes."""
    training: DigitTrainingConfig = DigitTrainingConfig()
    """How it learns."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of weights, order and shifts."""
    goal_percent: float | None = Field(default=None, gt=0)
    """Test error to stay below, printed beside the result."""


@dataclass(frozen=True)
class MnistBench:
    """Test error of a capsule network on MNIST over seeds; with --affine also on distorted digits."""

    config: Path
    """TOML file such as configs/mnist_efficient.toml."""
    data: Path
    """Folder with the four IDX files of MNIST, gzipped or not."""
    affine: bool = False
    """Instead train on digits placed on 40 pixels, beside a convolutional network of equal size, and score both on
    digits that are turned, sheared and scaled as well."""
    epochs: int | None = None
    """Passes over the training images; by default those of the configuration."""
    quick: bool = False
    """2,000 training images, one epoch, one seed: a minute instead of many."""


def load_mnist_config(path: Path) -> MnistConfig:
    """Reads the TOML file.

    Raises:
        ConfigError: unreadable, malformed, or fields that do not fit.
    """
    try:
        config = MnistConfig.model_validate_json(json.dumps(read_toml(path)))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path))) from error
    if config.model.classes != 10:
        raise ConfigError(f"{path}: model.classes = {config.model.classes}: MNIST has 10")
    if config.model.image_size != config.training.canvas:
        raise ConfigError(
            f"{path}: model.image_size = {config.model.image_size}: training.canvas is {config.training.canvas}; "
            "make them equal"
        )
    return config


def measure(options: MnistBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains with every seed and scores on the test images.

    Returns:
        The result, JSON-ready.

    Raises:
        ConfigError: the file cannot be used.
        ValueError: MNIST is not there, or an option is out of range.
    """
    config = load_mnist_config(options.config)
    train, test = read_mnist(options.data)
    seeds = config.seeds
    if options.affine:
        config = config.model_copy(
            update={
                "model": config.model.model_copy(update={"image_size": CANVAS}),
                "training": config.training.model_copy(update={"canvas": CANVAS}),
            }
        )
    if options.epochs is not None:
        if options.epochs < 1:
            raise ValueError(f"epochs = {options.epochs}: must be at least 1")
        config = config.model_copy(update={"training": config.training.model_copy(update={"epochs": options.epochs})})
    if options.quick:
        seeds = seeds[:1]
        config = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 1})})
        train = {name: rows[:2000] for name, rows in train.items()}
        test = {name: rows[:1000] for name, rows in test.items()}
    tests = {"test": test["image"]}
    if options.affine:
        images, keys = jax.numpy.asarray(test["image"]), (jax.random.key(2013), jax.random.key(20))
        distorted = jax.jit(place_distorted)(images, key=keys[0], distortion_key=keys[1])
        tests = {"test": np.asarray(place(images, key=keys[0])), "distorted": np.asarray(distorted)}
    makers: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
        config.model.name: lambda rngs: make_network(config.model, rngs=rngs)
    }
    if options.affine:
        weights = count_weights(make_network(config.model, rngs=nnx.Rngs(0)))
        makers["convolutional"] = lambda rngs: plain_of_size(weights, rngs=rngs)
    rows = []
    for name, make in makers.items():
        for seed in seeds:
            rows.append(_train_one(name, make, config.training, seed, train, tests, test["label"], say=say))
    return {
        "benchmark": f"mnist-affine-{config.model.name}" if options.affine else f"mnist-{config.model.name}",
        "quick": options.quick,
        "machine": describe(),
        "config": config.model_dump(mode="json"),
        "goal_percent": None if options.affine else config.goal_percent,
        "images": len(train["label"]),
        "rows": rows,
        "summary": {
            name: {
                part: statistics.fmean(row["error_percent"][part] for row in rows if row["network"] == name)
                for part in tests
            }
            for name in makers
        },
    }


def _train_one(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    training: DigitTrainingConfig,
    seed: int,
    train: dict[str, np.ndarray],
    tests: dict[str, np.ndarray],
    labels: np.ndarray,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    network = make(nnx.Rngs(seed))
    trainer = DigitTrainer(network, training, train["image"], train["label"])
    learned, curve = trainer.begin(), []
    start, cpu = time.perf_counter(), time.process_time()
    for epoch in range(training.epochs):
        learned, loss = trainer.epoch(learned, key=jax.random.fold_in(jax.random.key(seed), epoch))
        curve.append(loss)
        say(f"mnist, {name}, seed {seed}, epoch {epoch + 1} of {training.epochs}: loss {loss:.4f}")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    errors = {part: 100 * trainer.error(learned, images, labels) for part, images in tests.items()}
    told = ", ".join(f"{part} {error:.2f} %" for part, error in errors.items())
    say(f"mnist, {name}, seed {seed}: error {told} after {seconds:.0f} s")
    return {
        "network": name,
        "seed": seed,
        "weights": count_weights(network),
        "decoder_weights": sum(x.size for x in jax.tree.leaves(nnx.state(network, nnx.Param))) - count_weights(network),
        "hidden": network.hidden.out_features if isinstance(network, PlainDigits) else None,
        "error_percent": errors,
        "loss": curve,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }
