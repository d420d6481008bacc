"""A task: a Flax NNX model split into definition and weights, with the loss and the scores of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

Batch = Any
Scores = Mapping[str, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: used in checkpoints, ledger and page.
        loss: `(parameters, batch) -> scalar`, mean over the batch.
        scores: `(parameters, batch, weight) -> {name: (numerator, denominator)}`; `weight` is `(batch,)`, 0 for
            padded rows. A score of a hospital is the sum of numerators over the sum of denominators.
        parameters: initial weights, a pytree.
        merge: `parameters -> model`, for use after training.
        absolute_error: `(parameters, batch) -> (batch,)`, the mean absolute error of each record, from 0 to 1
            (Kumar et al. 2020, Eq 17); None where hospitals don't vote by it.
    """

    name: str
    loss: Callable[[Any, Batch], jax.Array]
    scores: Callable[[Any, Batch, jax.Array], Scores]
    parameters: Any
    merge: Callable[[Any], nnx.Module]
    absolute_error: Callable[[Any, Batch], jax.Array] | None = None


def make_task(
    name: str,
    model: nnx.Module,
    loss: Callable[[Any, Batch], jax.Array],
    scores: Callable[[Any, Batch, jax.Array], Scores] | None = None,
    absolute_error: Callable[[Any, Batch], jax.Array] | None = None,
) -> Task:
    """Splits an NNX model into the parts a jitted round needs.

    Args:
        name: name of the task.
        model: an NNX module whose trainable weights are `nnx.Param`; other state stays as it is.
        loss: `(model, batch) -> scalar`, mean over the batch.
        scores: `(model, batch, weight) -> {name: (numerator, denominator)}`; none by default.
        absolute_error: `(model, batch) -> (batch,)`, the mean absolute error of each record, from 0 to 1.

    Raises:
        ValueError: the model has no `nnx.Param`, or holds batch statistics, which a round does not carry.
    """
    if jax.tree.leaves(nnx.state(model, nnx.BatchStat)):
        raise ValueError(f"{name}: the model has batch statistics; use GroupNorm or LayerNorm in federated training")
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(parameters):
        raise ValueError(f"{name}: the model has no nnx.Param, so there is nothing to train")

    def merge(weights: Any) -> nnx.Module:
        return nnx.merge(graph, weights, rest)

    def batch_loss(weights: Any, batch: Batch) -> jax.Array:
        return loss(merge(weights), batch)

    def batch_scores(weights: Any, batch: Batch, weight: jax.Array) -> Scores:
        return scores(merge(weights), batch, weight) if scores else {}

    def batch_error(weights: Any, batch: Batch) -> jax.Array:
        assert absolute_error is not None
        return absolute_error(merge(weights), batch)

    return Task(name, batch_loss, batch_scores, parameters, merge, batch_error if absolute_error else None)
