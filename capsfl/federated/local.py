"""What one hospital does in a round: a few epochs of its own records, starting at the server's weights."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from capsfl.learning.tasks import BatchNormWeights, Task, augmented, record_keys, trainable, with_trainable
from capsfl.settings import Settings

_AUGMENTATION = 0x41554747


class LocalConfig(Settings):
    """Local training of a hospital within one round."""

    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """Local optimizer; its state starts afresh in every round."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Step size of the local optimizer, in the first round."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Step size from round to round: as it is, or falling towards zero along half a cosine, in the last of `rounds`
    the least (Loshchilov & Hutter 2017, equation 5, without restarts). What is learned settles, as by an average over
    the last rounds."""
    batch_size: int = Field(default=8, ge=1)
    """Records in one local step."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the hospital's records in one round."""
    proximal: float = Field(default=0.0, ge=0)
    """mu of FedProx (Li et al. 2020): adds mu/2 |w - w_t|^2 to the local loss, w_t being the server's weights."""
    shuffle: bool = True
    """Draws a fresh order of the records in every epoch; without, they are read as they stand."""


class LocalResult(NamedTuple):
    """The outcome of one hospital's round.

    Attributes:
        update: pytree like the trainable weights: local ones minus the server's.
        loss: scalar, mean training loss over the local steps; 0 for a hospital without records.
        steps: scalar int32, how many local steps were taken.
        statistics: the running statistics of batch normalisation after them; None of a model without.
    """

    update: Any
    loss: jax.Array
    steps: jax.Array
    statistics: Any = None


def augmentation_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """The key of a local step's augmentation, out of the hospital's key of the round."""
    # Orders of records and private steps are drawn from small numbers.
    return jax.random.fold_in(jax.random.fold_in(key, _AUGMENTATION), step)


def make_schedule(config: LocalConfig, *, rounds: int) -> Callable[[jax.Array], jax.Array] | None:
    """Builds `number of rounds before this one -> share of the learning rate`; None where the rate stays as it is."""
    if config.schedule == "constant":
        return None
    return lambda before: (1 + jnp.cos(jnp.pi * before / rounds)) / 2


def make_optimizer(config: LocalConfig, learning_rate: float | jax.Array | None = None) -> optax.GradientTransformation:
    """Builds the local optimizer; a given learning rate, traced in a sweep, replaces the configured one."""
    learning_rate = config.learning_rate if learning_rate is None else learning_rate
    if config.optimizer == "sgd":
        return optax.sgd(learning_rate)
    if config.optimizer == "momentum":
        return optax.sgd(learning_rate, momentum=0.9)
    return optax.adam(learning_rate)


def make_local_update(task: Task, config: LocalConfig) -> Callable[..., LocalResult]:
    """Builds the function one hospital runs in a round; it is vmapped over hospitals.

    A hospital of n records takes `epochs * ceil(n / batch_size)` steps over a fresh permutation per epoch; the
    last batch of an epoch is filled from its beginning, so every batch is full and no padded row is read. A task that
    augments changes every record of every step by a key of its own, folded from the hospital's key of the round, the
    step and the record.

    Returns:
        `(parameters, records, count, *, key, learning_rate, drift) -> LocalResult`. `learning_rate` may be traced;
        `drift`, a pytree like the parameters or None, is added to every gradient (the c - c_h of SCAFFOLD).
    """
    gradient = _make_gradient(task)

    def local_update(
        parameters: Any,
        records: Any,
        count: jax.Array,
        *,
        key: jax.Array,
        learning_rate: float | jax.Array = config.learning_rate,
        drift: Any = None,
    ) -> LocalResult:
        optimizer = make_optimizer(config, learning_rate)
        capacity = jax.tree.leaves(records)[0].shape[0]
        steps_per_epoch = (count + config.batch_size - 1) // config.batch_size
        steps = steps_per_epoch * config.epochs

        def step(index: jax.Array, carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            weights, optimizer_state, total = carry
            divisor = jnp.maximum(steps_per_epoch, 1)
            epoch, position = index // divisor, index % divisor
            slots = (position * config.batch_size + jnp.arange(config.batch_size)) % jnp.maximum(count, 1)
            if config.shuffle:
                draw = jax.random.uniform(jax.random.fold_in(key, epoch), (capacity,))
                slots = jnp.argsort(jnp.where(jnp.arange(capacity) < count, draw, jnp.inf))[slots]
            batch = jax.tree.map(lambda leaf: leaf[slots], records)
            if task.augment is not None:
                batch = augmented(task.augment, batch, record_keys(augmentation_key(key, index), slots))
            loss, grads, weights = gradient(weights, batch)
            moved = trainable(weights)
            if config.proximal:
                grads = jax.tree.map(lambda g, w, w_t: g + config.proximal * (w - w_t), grads, moved, origin)
            if drift is not None:
                grads = jax.tree.map(jnp.add, grads, drift)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, moved)
            return with_trainable(weights, optax.apply_updates(moved, updates)), optimizer_state, total + loss

        origin = trainable(parameters)
        start = (parameters, optimizer.init(origin), jnp.zeros(()))
        weights, _, total = jax.lax.fori_loop(0, steps, step, start)
        update = jax.tree.map(jnp.subtract, trainable(weights), origin)
        statistics = weights.statistics if isinstance(weights, BatchNormWeights) else None
        return LocalResult(update, total / jnp.maximum(steps, 1), steps, statistics)

    return local_update


def _make_gradient(task: Task) -> Callable[[Any, Any], tuple[jax.Array, Any, Any]]:
    """Builds `(weights, batch) -> (loss, gradient of the trainable part, weights with the statistics after it)`."""
    gathering = task.loss_and_statistics
    if gathering is None:
        plain = jax.value_and_grad(task.loss)
        return lambda weights, batch: (*plain(weights, batch), weights)

    def gradient(weights: BatchNormWeights, batch: Any) -> tuple[jax.Array, Any, Any]:
        def loss(moved: Any) -> tuple[jax.Array, Any]:
            return gathering(weights._replace(trainable=moved), batch)

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(weights.trainable)
        return value, grads, weights._replace(statistics=statistics)

    return gradient
