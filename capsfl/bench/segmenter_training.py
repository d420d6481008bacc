"""Trains segmentation networks alike: the same patches in the same order, the same optimizer and augmentation."""

import time
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from capsfl.bench.measuring import cold_compilation, compile_timed
from capsfl.bench.segmenter_data import Fold
from capsfl.learning.segmentation import PLANE_THRESHOLD, SegmentationConfig, Segmenter, make_segmentation_task
from capsfl.learning.tasks import augmented
from capsfl.settings import Settings


class SegmenterTrainingConfig(Settings):
    """How every network learns."""

    steps: int = Field(default=200, ge=1)
    """Steps of the optimizer; the weights after the last one are scored."""
    batch_size: int = Field(default=8, ge=1)
    """Patches in a step."""


class Trained(NamedTuple):
    """Weights after the last step, and what they took.

    Attributes:
        parameters: a pytree.
        losses: `(steps,)`.
        cpu_s: of all threads of the process in all steps, compilation left out.
    """

    parameters: Any
    losses: np.ndarray
    cpu_s: float


class Marked(NamedTuple):
    """What a network marks in the test cases of a fold, each `(z, y, x)` bool.

    Attributes:
        fused: by all planes together.
        axial: by the axial plane alone.
        cpu_s: of the network on all cases, compilation left out.
    """

    fused: list[np.ndarray]
    axial: list[np.ndarray]
    cpu_s: float


class SegmenterTrainer:
    """A network, its compiled training step and its program for whole volumes, for all seeds and folds.

    Args:
        config: the network, the planes, the augmentation.
        training: how it learns.
        pool: training patches as in `Fold`; every pool trained on later has the same shapes.
    """

    def __init__(
        self, config: SegmentationConfig, training: SegmenterTrainingConfig, pool: dict[str, np.ndarray]
    ) -> None:
        self.config, self.training = config, training
        self._task = task = make_segmentation_task(config, seed=0)
        self._optimizer = optimizer = optax.scale_by_adam()

        @jax.jit
        def draw(pool: Any, rows: jax.Array, key: jax.Array) -> Any:
            batch = jax.tree.map(lambda values: values[rows], pool)
            return augmented(task.augment, batch, jax.random.split(key, training.batch_size))

        # The step size comes in from outside, so that all that are tried share a program.
        def step(parameters: Any, moments: Any, batch: Any, rate: jax.Array) -> tuple[Any, Any, Any]:
            loss, gradient = jax.value_and_grad(task.loss)(parameters, batch)
            move, moments = optimizer.update(gradient, moments, parameters)
            return jax.tree.map(lambda value, by: value - rate * by, parameters, move), moments, loss

        moments = optimizer.init(task.parameters)
        # Drawing is the same for all networks, so that its memory and its compilation are not counted as theirs.
        self._draw = draw
        batch = draw(jax.tree.map(jnp.asarray, pool), jnp.zeros(training.batch_size, jnp.int32), _key(0, 0))
        # The persistent cache would give the time of reading a file.
        with cold_compilation():
            compiled = compile_timed(step, task.parameters, moments, batch, jnp.float32(0))
        self._step = compiled.call
        self._scores = jax.jit(task.scores)
        self._segmenter = Segmenter(task, config)
        self._programs: dict[tuple[int, ...], Any] = {}
        self.facts: dict[str, Any] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.parameters)),
            **{name: value for name, value in compiled.facts.items() if name.endswith("_bytes")},
        }
        """Parameters, and bytes that the step plans; JSON-ready."""

    def train(self, fold: Fold, *, seed: int, learning_rate: float, steps: int | None = None) -> Trained:
        """Trains from the seed's own weights; patches, their order and their changes are the seed's too.

        Args:
            fold: whose pool is trained on.
            seed: of weights, order and augmentation.
            learning_rate: peak of Adam's step size: reached after a tenth of all steps, then lowered to nothing along
                a cosine.
            steps: of a trial; all steps when None.
        """
        training = self.training.model_copy(update={"steps": steps or self.training.steps})
        parameters = make_segmentation_task(self.config, seed=seed).parameters
        moments = self._optimizer.init(parameters)
        pool = jax.tree.map(jnp.asarray, fold.pool)
        order = draw_order(len(fold.pool["truth"]), training, seed=seed)
        rates = step_sizes(training.steps, learning_rate)
        losses = []
        # Pools of another size are drawn from by another program.
        batch = self._draw(pool, jnp.asarray(order[0]), _key(seed, 0))
        jax.block_until_ready((parameters, moments, batch))
        cpu = time.process_time()
        for number, (rows, rate) in enumerate(zip(order, rates, strict=True)):
            batch = self._draw(pool, jnp.asarray(rows), _key(seed, number))
            parameters, moments, loss = self._step(parameters, moments, batch, rate)
            losses.append(loss)
        jax.block_until_ready(parameters)
        return Trained(parameters, np.asarray(losses), time.process_time() - cpu)

    def held_back_dice(self, parameters: Any, patches: dict[str, np.ndarray]) -> float:
        """Returns the Dice of all pixels of all patches together."""
        size, count = self.training.batch_size, len(patches["truth"])
        both = total = 0.0
        for rows in np.array_split(np.arange(count), ceil(count / size)):
            # Every batch is full, so that one program serves all; rows that fill it count nothing.
            filled = np.resize(rows, size)
            batch = {name: jnp.asarray(values[filled]) for name, values in patches.items()}
            weight = jnp.asarray(np.arange(size) < len(rows), jnp.float32)
            found = self._scores(parameters, batch, weight)["dice"]
            both, total = both + float(found[0]), total + float(found[1])
        return both / total if total else 1.0

    def mark(self, parameters: Any, fold: Fold) -> Marked:
        """Marks the fold's test cases."""
        # Several cases are single slices, which a program of the axial plane takes for one volume.
        assert len(fold.test) == 1 or self.config.planes == ("xy",)
        hu, body = (np.concatenate([getattr(case, name) for case in fold.test]) for name in ("hu", "body"))
        given = (parameters, jnp.asarray(hu, jnp.float32), jnp.asarray(body))
        if hu.shape not in self._programs:
            self._programs[hu.shape] = self._segmenter.program.lower(*given).compile()
        cpu = time.process_time()
        found = np.asarray(self._programs[hu.shape](*given))
        cpu = time.process_time() - cpu
        planes: dict[str, np.ndarray] = dict(zip(self.config.planes, found, strict=True))
        cuts = np.cumsum([len(case.hu) for case in fold.test])[:-1]
        fused, axial = self._segmenter.marked(planes), planes["xy"] >= PLANE_THRESHOLD
        return Marked(np.split(fused, cuts), np.split(axial, cuts), cpu)


def draw_order(patches: int, training: SegmenterTrainingConfig, *, seed: int) -> np.ndarray:
    """Returns which patches each step sees, `(steps, batch_size)` int32: all of them once before any again."""
    wanted = training.steps * training.batch_size
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(patches) for _ in range(-(-wanted // patches))]
    return np.concatenate(rounds)[:wanted].reshape(training.steps, -1).astype(np.int32)


def step_sizes(steps: int, peak: float) -> np.ndarray:
    """Returns Adam's step sizes `(steps,)` float32: up to the peak in a tenth of them, then down along a cosine."""
    warm_up = max(steps // 10, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, max(steps, warm_up + 1))
    return np.asarray(schedule(np.arange(steps)), np.float32)


def _key(seed: int, step: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), step)
