"""A volume seen as slices of three planes, and the fusion of what a network says about each of them."""

from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.special import expit

# NumPy and JAX arrays alike, traced ones included: slicing and fusing only use what both of them have.
Array: TypeAlias = Any
Plane: TypeAlias = Literal["xy", "yz", "xz"]
Rule: TypeAlias = Literal["mean", "max", "min", "learned"]

PLANES: tuple[Plane, ...] = ("xy", "yz", "xz")
"""The three planes in the order in which `fuse` takes them."""

# Axes of a (z, y, x) volume in the order (slice, row, column).
_AXES: dict[Plane, tuple[int, int, int]] = {"xy": (0, 1, 2), "yz": (2, 0, 1), "xz": (1, 0, 2)}

_RULES: tuple[Rule, ...] = ("mean", "max", "min", "learned")

# A pull towards zero, in voxels, that keeps the fit finite when the planes separate the classes perfectly.
_RIDGE = 1e-3


def plane_axes(plane: Plane) -> tuple[int, int, int]:
    """Return the axes of a `(z, y, x)` volume along which a plane's slices follow each other, its rows, its columns.

    Raises:
        ValueError: if the plane is not among the choices.
    """
    if plane not in _AXES:
        raise ValueError(f"plane {plane!r}: expected one of {', '.join(_AXES)}")
    return _AXES[plane]


def slices_of(volume: Array, plane: Plane, channels: int = 1) -> Array:
    """Return the slices of a `(z, y, x)` volume in one plane as `(slices, height, width, channels)`.

    Rows and columns are (y, x) in "xy", (z, y) in "yz" and (z, x) in "xz". With 5 channels a slice stands in
    the middle of its neighbours; at the border the outermost slice is repeated.

    Raises:
        ValueError: if the volume has not three axes, or plane or channels are not among the choices.
    """
    axes = plane_axes(plane)
    _check(volume, channels)
    slices = volume.transpose(axes)
    if channels == 1:
        return slices[..., None]
    reach = channels // 2
    neighbours = np.arange(len(slices))[:, None] + np.arange(-reach, reach + 1)
    return slices[np.clip(neighbours, 0, len(slices) - 1)].transpose(0, 2, 3, 1)


def slice_at(volume: Array, plane: Plane, index: Array | int, channels: int = 1) -> Array:
    """Return one of the slices of `slices_of`, `(height, width, channels)`, without cutting the others.

    Args:
        volume: `(z, y, x)`.
        plane: the plane in which it lies.
        index: its place, which may be traced: a loop over slices then holds one of them at a time.
        channels: 1, or 5 for its neighbours as well.

    Raises:
        ValueError: as `slices_of` does.
    """
    axis = plane_axes(plane)[0]
    reach = _check(volume, channels) // 2
    slab = volume.take(index + np.arange(-reach, reach + 1), axis=axis, mode="clip")
    # What is left of (z, y, x) without the slice's axis are its rows and columns, in this order.
    return slab.transpose(*(other for other in range(3) if other != axis), axis)


def volume_from(slices: Array, plane: Plane) -> Array:
    """Return the `(z, y, x)` volume that `slices_of` cut up, the inverse of it.

    Args:
        slices: `(slices, height, width)`, or with channels last, of which the middle one is taken.
        plane: the plane in which they lie.

    Raises:
        ValueError: if slices have neither three nor four axes, or the plane is not among the choices.
    """
    axes = plane_axes(plane)
    if slices.ndim == 4:
        slices = slices[..., slices.shape[-1] // 2]
    if slices.ndim != 3:
        raise ValueError(f"slices {slices.shape}: expected (slices, height, width) or one more axis of channels")
    return slices.transpose(tuple(int(axis) for axis in np.argsort(axes)))


def fuse(probabilities: Array, *, rule: Rule = "mean", weights: np.ndarray | None = None) -> Array:
    """Fuse `(planes, z, y, x)` probabilities into one `(z, y, x)` probability (the g of equations 2 and 3).

    Args:
        probabilities: one volume per plane, in the order of `PLANES`.
        rule: "mean" (Zhou et al. 2020), "max", "min", or "learned", `sigmoid(w . p + b)`.
        weights: for "mean" `(planes,)` non-negative weights or None for equal ones; for "learned" the
            `(planes + 1,)` of `fit_fusion`, the bias last.

    Raises:
        ValueError: if the rule is not among the choices or the weights do not fit it.
    """
    if rule == "mean":
        score, total = _weighted_sum(probabilities, weights)
        return score / total
    if rule == "learned":
        if weights is None or len(weights) != len(probabilities) + 1:
            raise ValueError("rule 'learned' needs a weight per plane and a bias; fit them with fit_fusion")
        *slopes, bias = (float(weight) for weight in weights)
        scores = sum(slope * plane for slope, plane in zip(slopes, probabilities, strict=True)) + bias
        # The logistic function by way of tanh, which does not overflow.
        return (1 + probabilities.__array_namespace__().tanh(scores / 2)) / 2
    if weights is not None:
        raise ValueError(f"weights have no meaning for rule {rule!r}; leave them out")
    if rule == "max":
        return probabilities.max(axis=0)
    if rule == "min":
        return probabilities.min(axis=0)
    raise ValueError(f"rule {rule!r}: expected one of {', '.join(_RULES)}")


def default_threshold(rule: Rule, planes: int) -> float:
    """Return the fused probability above which a voxel is marked where none is given.

    For "mean" it is 2/3 of three planes: Zhou et al. 2020 ask for a sum above 2, so that two sure planes need the
    third. The same of fewer planes, and every other rule, is 1/2.
    """
    return max(0.5, (planes - 1) / planes) if rule == "mean" else 0.5


def fused_mask(
    probabilities: Array,
    *,
    rule: Rule = "mean",
    weights: np.ndarray | None = None,
    threshold: float | None = None,
) -> Array:
    """Return where `(planes, z, y, x)` probabilities fuse to more than a threshold, as `(z, y, x)` bool.

    Without a threshold it is that of `default_threshold`.

    Raises:
        ValueError: as `fuse` does.
    """
    if threshold is None:
        threshold = default_threshold(rule, len(probabilities))
    if rule == "mean":
        # Compared as sums: two sure planes of three are a sum of exactly 2, while a rounded mean may exceed 2/3.
        score, total = _weighted_sum(probabilities, weights)
        return score > threshold * total
    return fuse(probabilities, rule=rule, weights=weights) > threshold


def fit_fusion(probabilities: np.ndarray, truth: np.ndarray, *, iterations: int = 50) -> np.ndarray:
    """Fit the `(planes + 1,)` weights of the "learned" rule by logistic regression (Newton's method).

    Args:
        probabilities: `(planes, ...)` probabilities of validation voxels.
        truth: `(...)`, 0 or 1.
        iterations: upper bound on the steps of Newton's method.

    Raises:
        ValueError: if the shapes do not fit or only one class is present.
    """
    if probabilities.shape[1:] != truth.shape:
        raise ValueError(f"truth {truth.shape} does not fit probabilities {probabilities.shape}")
    target = np.asarray(truth, np.float64).ravel()
    if not 0 < target.sum() < target.size:
        raise ValueError("truth holds one class only; the learned rule needs foreground and background voxels")
    features = np.vstack([probabilities.reshape(len(probabilities), -1), np.ones((1, target.size))])
    features = features.astype(np.float64)
    weights = np.zeros(len(features))
    penalty = _RIDGE * np.eye(len(features))
    # Newton's method from zero may overshoot where the classes are far apart; halve the step until it helps.
    loss = _logistic_loss(weights, features, target)
    for _ in range(iterations):
        fitted = expit(weights @ features)
        gradient = features @ (fitted - target) + penalty @ weights
        hessian = (features * (fitted * (1 - fitted))) @ features.T + penalty
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and _logistic_loss(weights - size * step, features, target) > loss:
            size /= 2
        weights = weights - size * step
        loss = _logistic_loss(weights, features, target)
        if np.abs(size * step).max() < 1e-9:
            break
    return weights


def _logistic_loss(weights: np.ndarray, features: np.ndarray, target: np.ndarray) -> float:
    scores = weights @ features
    return float(np.sum(np.logaddexp(0, scores) - target * scores) + _RIDGE / 2 * weights @ weights)


def _weighted_sum(probabilities: Array, weights: np.ndarray | None) -> tuple[Array, float]:
    weights = np.ones(len(probabilities)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(probabilities),) or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(
            f"weights {weights.tolist()}: rule 'mean' needs {len(probabilities)}, none negative, one positive"
        )
    factors = weights.tolist()
    return sum(factor * plane for factor, plane in zip(factors, probabilities, strict=True)), sum(factors)


def _check(volume: Array, channels: int) -> int:
    if volume.ndim != 3:
        raise ValueError(f"volume {volume.shape}: expected three axes (z, y, x)")
    if channels not in (1, 5):
        raise ValueError(f"channels {channels}: expected 1 or 5")
    return channels
