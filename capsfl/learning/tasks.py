"""A task: a Flax NNX model split into definition and weights, with the loss and the scores of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

Batch = Any
Scores = Mapping[str, tuple[jax.Array, jax.Array]]
Augment = Callable[[jax.Array, Any], Any]
"""`(key, record) -> record` of the same shapes and types, for one record without the batch's axis."""


class BatchNormWeights(NamedTuple):
    """The weights of a model with batch normalisation (Ioffe & Szegedy 2015).

    Attributes:
        trainable: what gradients move, a pytree of `nnx.Param`.
        statistics: the running means and variances, a pytree of `nnx.BatchStat`.
    """

    trainable: Any
    statistics: Any


def trainable(weights: Any) -> Any:
    """Returns the part of a task's weights that gradients move: all of them, where there are no statistics."""
    return weights.trainable if isinstance(weights, BatchNormWeights) else weights


def with_trainable(weights: Any, moved: Any) -> Any:
    """Returns weights with another trainable part."""
    return weights._replace(trainable=moved) if isinstance(weights, BatchNormWeights) else moved


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: used in checkpoints, ledger and page.
        loss: `(parameters, batch) -> scalar`, mean over the batch.
        scores: `(parameters, batch, weight) -> {name: (numerator, denominator)}`; `weight` is `(batch,)`, 0 for
            padded rows. A score of a hospital is the sum of numerators over the sum of denominators.
        parameters: initial weights, a pytree; `BatchNormWeights` of a model with batch normalisation.
        merge: `parameters -> model`, for use after training: batch normalisation takes the running statistics.
        absolute_error: `(parameters, batch) -> (batch,)`, the mean absolute error of each record, from 0 to 1
            (Kumar et al. 2020, Eq 17); None where hospitals don't vote by it.
        augment: changes a training record at random; None where records are taken as they are. Scores and votes see
            them as they are.
        loss_and_statistics: `(parameters, batch) -> (loss, statistics)` of a model with batch normalisation: the
            running statistics after the batch; None without.
    """

    name: str
    loss: Callable[[Any, Batch], jax.Array]
    scores: Callable[[Any, Batch, jax.Array], Scores]
    parameters: Any
    merge: Callable[[Any], nnx.Module]
    absolute_error: Callable[[Any, Batch], jax.Array] | None = None
    augment: Augment | None = None
    loss_and_statistics: Callable[[Any, Batch], tuple[jax.Array, Any]] | None = None


def make_task(
    name: str,
    model: nnx.Module,
    loss: Callable[[Any, Batch], jax.Array],
    scores: Callable[[Any, Batch, jax.Array], Scores] | None = None,
    absolute_error: Callable[[Any, Batch], jax.Array] | None = None,
    augment: Augment | None = None,
) -> Task:
    """Splits an NNX model into the parts a jitted round needs.

    Args:
        name: name of the task.
        model: an NNX module whose trainable weights are `nnx.Param`. `nnx.BatchStat` follows the batches in training
            and is read in scores; other state stays as it is.
        loss: `(model, batch) -> scalar`, mean over the batch.
        scores: `(model, batch, weight) -> {name: (numerator, denominator)}`; none by default.
        absolute_error: `(model, batch) -> (batch,)`, the mean absolute error of each record, from 0 to 1.
        augment: `(key, record) -> record`, which changes a training record at random; none by default.

    Raises:
        ValueError: the model has no `nnx.Param`.
    """
    graph, parameters, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    if not jax.tree.leaves(parameters):
        raise ValueError(f"{name}: the model has no nnx.Param, so there is nothing to train")
    gathers = bool(jax.tree.leaves(statistics))
    training = graph
    if gathers:
        training, graph = (_graph(model, evaluated=evaluated) for evaluated in (False, True))
        parameters = BatchNormWeights(parameters, statistics)

    def merge(weights: Any) -> nnx.Module:
        return nnx.merge(graph, trainable(weights), weights.statistics if gathers else statistics, rest)

    def loss_and_statistics(weights: BatchNormWeights, batch: Batch) -> tuple[jax.Array, Any]:
        # A copy: the statistics that a batch leaves must not be written into the weights it was given.
        gathering = nnx.merge(training, weights.trainable, weights.statistics, rest, copy=True)
        return loss(gathering, batch), nnx.state(gathering, nnx.BatchStat)

    def batch_loss(weights: Any, batch: Batch) -> jax.Array:
        return loss_and_statistics(weights, batch)[0] if gathers else loss(merge(weights), batch)

    def batch_scores(weights: Any, batch: Batch, weight: jax.Array) -> Scores:
        return scores(merge(weights), batch, weight) if scores else {}

    def batch_error(weights: Any, batch: Batch) -> jax.Array:
        assert absolute_error is not None
        return absolute_error(merge(weights), batch)

    return Task(
        name,
        batch_loss,
        batch_scores,
        parameters,
        merge,
        batch_error if absolute_error else None,
        augment,
        loss_and_statistics if gathers else None,
    )


def _graph(model: nnx.Module, *, evaluated: bool) -> Any:
    """The definition of a model that is in training, or no longer."""
    copied = nnx.merge(*nnx.split(model), copy=True)
    (copied.eval if evaluated else copied.train)()
    return nnx.split(copied)[0]


def augmented(augment: Augment | None, batch: Batch, keys: jax.Array | None) -> Batch:
    """Changes each record of a batch `(batch, ...)` by the key `(batch,)` of its own; as it is without."""
    return batch if augment is None or keys is None else jax.vmap(augment)(keys, batch)


def record_keys(key: jax.Array, records: jax.Array) -> jax.Array:
    """Folds the numbers `(records,)` of a hospital's records into a key, one key for each."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, records)
