"""The learned rule g that fuses three planes (Kumar et al. 2020, Eq 2): fitted to the masks of validation patients."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.models.planes import fit_fusion

MAX_VOXELS = 1 << 21
"""Voxels the rule is fitted to at most, drawn evenly over the patients; four parameters need no more."""
FILE = "fusion.json"
"""Where a run keeps its rule."""
NO_MASKS = (
    'segmentation.fusion = "learned": no validation patient has a mask that marks anything, to fit the weights to; '
    "hold some out (data.validation_fraction) or choose mean, max or min"
)


class FusionError(ValueError):
    """A learned rule that cannot be fitted or read; the message names the field or the file."""


def learn_fusion(
    scans: Iterable[tuple[Mapping[str, np.ndarray], np.ndarray]], planes: Sequence[str], *, seed: int
) -> np.ndarray:
    """Fits a weight per plane and a bias, `sigmoid(w . p + b)`, to what the planes say about masked scans.

    The weights are those of the logistic regression. Of few marked voxels among many it believes none with more than
    1/2; the bias is therefore moved to where marking above 1/2 gives these scans, taken together, the highest Dice.

    Only voxels that some plane gives a chance count: outside the body all of them say 0, and nothing is marked there.
    No noise is added: the weights know the patients they were fitted to.

    Args:
        scans: per patient the `(z, y, x)` probabilities of every plane, and the `(z, y, x)` truth.
        planes: their order in the weights.
        seed: of the voxels that are drawn where there are many.

    Returns:
        `(planes + 1,)` float64, the bias last.

    Raises:
        FusionError: no patients, or masks that are empty or fill everything.
    """
    features, truths = [], []
    for probabilities, truth in scans:
        stacked = np.stack([probabilities[plane] for plane in planes])
        seen = stacked.any(axis=0)
        features.append(stacked[:, seen])
        truths.append(truth[seen])
    if not truths:
        raise FusionError(NO_MASKS)
    share = min(1.0, MAX_VOXELS / sum(map(len, truths)))
    if share < 1:
        generator = np.random.default_rng(seed)
        for index, truth in enumerate(truths):
            drawn = generator.random(len(truth)) < share
            features[index], truths[index] = features[index][:, drawn], truth[drawn]
    probabilities, truth = np.concatenate(features, axis=1), np.concatenate(truths)
    try:
        weights = fit_fusion(probabilities, truth)
    except ValueError as error:
        raise FusionError(
            f'segmentation.fusion = "learned": {error}; hold out other validation patients or choose mean, max or min'
        ) from error
    weights[-1] = -_best_cut(weights[:-1] @ probabilities, truth)
    return weights


def _best_cut(scores: np.ndarray, truth: np.ndarray) -> float:
    """The score above which voxels are marked for the highest Dice, halfway to the next lower one."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    dice = 2 * np.cumsum(truth[order]) / (np.arange(1, len(ranked) + 1) + truth.sum())
    # Equal scores are marked together or not at all.
    dice[:-1][ranked[:-1] == ranked[1:]] = 0
    best = int(np.argmax(dice))
    lower = ranked[best + 1] if best + 1 < len(ranked) else ranked[best] - 1
    return float(ranked[best] + lower) / 2


def fusion_to_json(weights: np.ndarray, planes: Sequence[str], patients: Sequence[str]) -> dict[str, Any]:
    """The rule as JSON values, with the validation patients that it knows."""
    *slopes, bias = (float(weight) for weight in weights)
    return {
        "rule": "learned",
        "weights": dict(zip(planes, slopes, strict=True)),
        "bias": bias,
        "fitted_on": list(patients),
        "private": False,
    }


def load_fusion(run: Path, planes: Sequence[str]) -> np.ndarray:
    """Reads back the `(planes + 1,)` weights that a run fitted.

    Raises:
        FusionError: the file is missing, damaged or of other planes.
    """
    path = run / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        weights = np.array([*(float(record["weights"][plane]) for plane in planes), float(record["bias"])])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FusionError(f"{path}: no usable weights of the planes; let `capsfl train` finish first") from error
    if len(record["weights"]) != len(planes) or not np.isfinite(weights).all():
        raise FusionError(f"{path}: weights of other planes than {', '.join(planes)}, or not finite; train again")
    return weights
