"""Trains segmentation networks alike: the same patches in the same order, the same optimizer and augmentation."""

import time
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
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of Adam's step size: reached after a tenth of all steps, then lowered to nothing along a cosine."""


class Trained(NamedTuple):
    """Weights after the last step, and what they took.

    Attributes:
        parameters: a pytree.
        losses: `(steps,)`.
        wall_s: of all steps, compilation left out.
        cpu_s: the same, of all threads of the process.
    """

    parameters: Any
    losses: np.ndarray
    wall_s: float
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
        warm_up = max(training.steps // 10, 1)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, training.learning_rate, warm_up, max(training.steps, warm_up + 1)
        )
        self._optimizer = optimizer = optax.adam(rate)

        @jax.jit
        def draw(pool: Any, rows: jax.Array, key: jax.Array) -> Any:
            batch = jax.tree.map(lambda values: values[rows], pool)
            return augmented(task.augment, batch, jax.random.split(key, training.batch_size))

        def step(parameters: Any, moments: Any, batch: Any) -> tuple[Any, Any, Any]:
            loss, gradient = jax.value_and_grad(task.loss)(parameters, batch)
            move, moments = optimizer.update(gradient, moments, parameters)
            return optax.apply_updates(parameters, move), moments, loss

        moments = optimizer.init(task.parameters)
        # Drawing is the same for all networks, so that its memory and its compilation are not counted as theirs.
        self._draw = draw
        batch = draw(jax.tree.map(jnp.asarray, pool), jnp.zeros(training.batch_size, jnp.int32), _key(0, 0))
        # The persistent cache would give the time of reading a file.
        with cold_compilation():
            compiled = compile_timed(step, task.parameters, moments, batch)
        self._step = compiled.call
        self._segmenter = Segmenter(task, config)
        self._programs: dict[tuple[int, ...], Any] = {}
        self.facts: dict[str, Any] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.parameters)),
            **compiled.facts,
        }
        """Parameters, seconds of tracing and compiling the step, bytes that it plans; JSON-ready."""

    def train(self, fold: Fold, *, seed: int) -> Trained:
        """Trains from the seed's own weights; patches, their order and their changes are the seed's too."""
        parameters = make_segmentation_task(self.config, seed=seed).parameters
        moments = self._optimizer.init(parameters)
        pool = jax.tree.map(jnp.asarray, fold.pool)
        order = draw_order(len(fold.pool["truth"]), self.training, seed=seed)
        losses = []
        jax.block_until_ready((parameters, moments, pool))
        wall, cpu = time.perf_counter(), time.process_time()
        for number, rows in enumerate(order):
            batch = self._draw(pool, jnp.asarray(rows), _key(seed, number))
            parameters, moments, loss = self._step(parameters, moments, batch)
            losses.append(loss)
        jax.block_until_ready(parameters)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Trained(parameters, np.asarray(losses), wall, cpu)

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


def _key(seed: int, step: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), step)
