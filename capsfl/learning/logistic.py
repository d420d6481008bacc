"""Logistic regression on a few numbers: what a control or a probe can tell without a network."""

from typing import Any, NamedTuple, cast

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax


class LogisticModel(NamedTuple):
    """A fitted regression.

    Attributes:
        centre: `(features,)` mean of each feature in training.
        scale: `(features,)` its standard deviation; 1 for a constant one.
        slopes: `(features, classes)`.
        offsets: `(classes,)`.
    """

    centre: np.ndarray
    scale: np.ndarray
    slopes: np.ndarray
    offsets: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns `(rows, classes)` probabilities of `(rows, features)`."""
        return softmax((features - self.centre) / self.scale @ self.slopes + self.offsets, axis=1)


def fit_logistic(
    features: np.ndarray, labels: np.ndarray, *, classes: int, weights: np.ndarray | None = None, penalty: float = 1.0
) -> LogisticModel:
    """Fits a multinomial logistic regression with an L2 penalty on standardised features.

    Minimises `sum_i w_i (-log p(label_i)) + penalty / 2 |slopes|^2`; offsets go free.

    Args:
        features: `(rows, features)`.
        labels: `(rows,)` integers from 0 to classes - 1.
        classes: number of classes.
        weights: `(rows,)`, or None for equal weights of 1.
        penalty: of the slopes.

    Raises:
        ValueError: the rows do not fit each other, or a feature is not finite.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != (len(features),) or not len(features):
        raise ValueError(f"features {features.shape} and labels {labels.shape}: expected one row for each label")
    if not np.isfinite(features).all():
        raise ValueError(f"features: {int(np.sum(~np.isfinite(features)))} of {features.size} are not finite")
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    centre, spread = features.mean(axis=0), features.std(axis=0)
    scale = np.where(spread > 1e-12, spread, 1.0)
    rows = (features - centre) / scale
    truth = np.eye(classes)[labels]
    width = rows.shape[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        table = flat.reshape(width + 1, classes)
        logs = log_softmax(rows @ table[:-1] + table[-1], axis=1)
        residual = weights[:, None] * (np.exp(logs) - truth)
        gradient = np.vstack([rows.T @ residual + penalty * table[:-1], residual.sum(axis=0, keepdims=True)])
        cost = -np.sum(weights[:, None] * truth * logs) + penalty / 2 * np.sum(np.square(table[:-1]))
        return float(cost), gradient.ravel()

    found = cast(Any, minimize(objective, np.zeros((width + 1) * classes), jac=True, method="L-BFGS-B"))
    table = found.x.reshape(width + 1, classes)
    return LogisticModel(centre, scale, table[:-1], table[-1])
