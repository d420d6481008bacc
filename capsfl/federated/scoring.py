"""Scores of weights on held-out records, hospital by hospital, in batches of fixed shape."""

from typing import Any

import jax
import jax.numpy as jnp

from capsfl.learning.tasks import Scores, Task


def score_hospitals(
    task: Task, parameters: Any, records: Any, counts: jax.Array, *, batch_size: int, statistics: Any = None
) -> Scores:
    """Returns `{score: (numerator, denominator)}`, each `(hospitals,)`; rows beyond a count weigh nothing.

    Args:
        task: gives the scores of a batch.
        parameters: weights.
        records: pytree `(hospitals, records, ...)`.
        counts: `(hospitals,)`, how many records are real.
        batch_size: records of one forward pass; bounds the memory and changes no score beyond rounding.
        statistics: of batch normalisation, leaves `(hospitals, ...)`, where each hospital has its own.
    """
    capacity = jax.tree.leaves(records)[0].shape[1]
    batch_size = min(batch_size, capacity)
    batches = -(-capacity // batch_size)

    def one_hospital(inputs: tuple[Any, jax.Array, Any]) -> Scores:
        rows, count, own = inputs
        weights = parameters if own is None else parameters._replace(statistics=own)

        def one_batch(index: jax.Array) -> Scores:
            slots = index * batch_size + jnp.arange(batch_size)
            batch = jax.tree.map(lambda leaf: leaf[jnp.minimum(slots, capacity - 1)], rows)
            return task.scores(weights, batch, (slots < count).astype(jnp.float32))

        return jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(one_batch, jnp.arange(batches)))

    return jax.lax.map(one_hospital, (records, jnp.asarray(counts), statistics))
